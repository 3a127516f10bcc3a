// The operations of L-BFGS with step control on the CPU.
#include <torch/csrc/stable/library.h>

#include "../common/secant.h"
#include "../cpu/secant.h"
#include "cpu_arguments.h"

namespace adaqn {
namespace {

double* words_of(const Tensor& words, const Place& place) {
  return doubles_of(words, {"words"}, place, {word::count});
}

/// The rows of s or y: at least the free one.
Matrix secants_of(const Tensor& ring, const Name& name, const Place& place, int64_t columns,
                  Dtype dtype) {
  return ring_of(ring, name, place, 1, columns, dtype);
}

void secant_measure(const Tensors& params, const OptionalTensors& grads, const Tensor& loss,
                    bool maximize, const Tensor& direction, const Tensor& trial,
                    const Tensor& words) {
  const Place place(trial);
  const Dtype dtype = vector_dtype(trial, {"trial"});
  const cpu::Gradient gradient{grads_of(grads, params, place), false, 1, maximize, 0};
  const int64_t size = gradient.tensors.size();
  cpu::secant_measure(parallel_for,
                      {gradient, dtype, numbers_of(loss, {"loss"}, place, 1)[0],
                       vector_of(direction, {"direction"}, place, size, dtype),
                       vector_of(trial, {"trial"}, place, size, dtype), words_of(words, place)});
}

void secant_decide(double decrease, double noise, double tolerance_grad, double tolerance_change,
                   int64_t max_trials, int64_t max_iter, const Tensor& counters,
                   const Tensor& words) {
  const Place place(words);
  decide({decrease, noise, tolerance_grad, tolerance_change, max_trials, max_iter},
         counters_of(counters, place), words_of(words, place));
}

void secant_keep(const Tensors& params, const Tensor& words, const Tensor& origin) {
  const Place place(origin);
  const Dtype dtype = vector_dtype(origin, {"origin"});
  const Scattered vector = params_of(params, place);
  cpu::secant_keep(parallel_for, vector, dtype, words_of(words, place),
                   vector_of(origin, {"origin"}, place, vector.size(), dtype));
}

void secant_pair(const Tensor& trial, const Tensor& direction, double absolute, double relative,
                 bool self_scaled, const Tensor& gradient, const Tensor& s_ring,
                 const Tensor& y_ring, const Tensor& gram, const Tensor& scales,
                 const Tensor& projections, const Tensor& counters, const Tensor& words) {
  const Place place(trial);
  const Dtype dtype = vector_dtype(trial, {"trial"});
  const int64_t size = trial.numel();
  const Matrix s = secants_of(s_ring, {"s_ring"}, place, size, dtype);
  const Matrix y = secants_of(y_ring, {"y_ring"}, place, size, dtype);
  check_ring_shape(y_ring, {"y_ring"}, place, s.rows, size);
  check_dtype(y_ring, {"y_ring"}, s_ring.scalar_type());
  int64_t* counts = counters_of(counters, place);
  check_pair_words(counts, s.rows);
  cpu::secant_pair(parallel_for,
                   {dtype, vector_of(trial, {"trial"}, place, size, dtype),
                    vector_of(direction, {"direction"}, place, size, dtype), absolute, relative,
                    self_scaled, vector_of(gradient, {"gradient"}, place, size, dtype), s, y,
                    doubles_of(gram, {"gram"}, place, {s.rows + 1, s.rows}),
                    doubles_of(scales, {"scales"}, place, {s.rows}),
                    doubles_of(projections, {"projections"}, place, {s.rows + flag::count}), counts,
                    words_of(words, place)});
}

void secant_residual(const Tensor& gradient, const Tensor& y_ring, const Tensor& gram,
                     const Tensor& counters, const Tensor& projections, const Tensor& words,
                     bool identity, const Tensor& residual, const Tensor& images) {
  const Place place(gradient);
  const Dtype dtype = vector_dtype(gradient, {"gradient"});
  const int64_t size = gradient.numel();
  const Matrix y = secants_of(y_ring, {"y_ring"}, place, size, dtype);
  const int64_t* counts = counters_of(counters, place);
  check_pair_words(counts, y.rows);
  cpu::secant_residual(
      parallel_for,
      {dtype, vector_of(gradient, {"gradient"}, place, size, dtype), y,
       doubles_of(gram, {"gram"}, place, {y.rows + 1, y.rows}), counts,
       doubles_of(projections, {"projections"}, place, {y.rows + flag::count}),
       words_of(words, place), identity, vector_of(residual, {"residual"}, place, size, dtype),
       doubles_of(images, {"images"}, place, {y.rows + 1})});
}

void secant_combine(const Tensor& gradient, const Tensor& s_ring, const Tensor& gram,
                    const Tensor& scales, const Tensor& counters, const Tensor& projections,
                    const Tensor& images, const Tensor& residual, double lr, double first,
                    const Tensor& direction, const Tensor& words) {
  const Place place(gradient);
  const Dtype dtype = vector_dtype(gradient, {"gradient"});
  const int64_t size = gradient.numel();
  const Matrix s = secants_of(s_ring, {"s_ring"}, place, size, dtype);
  const int64_t* counts = counters_of(counters, place);
  check_pair_words(counts, s.rows);
  cpu::secant_combine(
      parallel_for,
      {dtype, vector_of(gradient, {"gradient"}, place, size, dtype), s,
       doubles_of(gram, {"gram"}, place, {s.rows + 1, s.rows}),
       doubles_of(scales, {"scales"}, place, {s.rows}), counts,
       doubles_of(projections, {"projections"}, place, {s.rows + flag::count}),
       doubles_of(images, {"images"}, place, {s.rows + 1}),
       vector_of(residual, {"residual"}, place, size, dtype), lr, first,
       vector_of(direction, {"direction"}, place, size, dtype), words_of(words, place)});
}

void secant_move(const Tensors& params, const Tensor& origin, const Tensor& direction,
                 std::optional<double> step, double limit, const Tensor& words) {
  const Place place(origin);
  const Dtype dtype = vector_dtype(origin, {"origin"});
  const Scattered vector = params_of(params, place);
  double* numbers = words_of(words, place);
  const cpu::Move move{vector,
                       dtype,
                       vector_of(origin, {"origin"}, place, vector.size(), dtype),
                       vector_of(direction, {"direction"}, place, vector.size(), dtype),
                       limit,
                       numbers};
  if (step) numbers[word::step] = *step;
  cpu::secant_move(parallel_for, move);
}

}  // namespace
}  // namespace adaqn

STABLE_TORCH_LIBRARY_IMPL(adaqn, CPU, m) {
  m.impl("secant_measure", TORCH_BOX(&adaqn::secant_measure));
  m.impl("secant_decide", TORCH_BOX(&adaqn::secant_decide));
  m.impl("secant_keep", TORCH_BOX(&adaqn::secant_keep));
  m.impl("secant_pair", TORCH_BOX(&adaqn::secant_pair));
  m.impl("secant_residual", TORCH_BOX(&adaqn::secant_residual));
  m.impl("secant_combine", TORCH_BOX(&adaqn::secant_combine));
  m.impl("secant_move", TORCH_BOX(&adaqn::secant_move));
}
