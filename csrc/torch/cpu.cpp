// The operations of adaqn_cuda/ops.py on the CPU.
#include <torch/csrc/stable/library.h>

#include "../cpu/curvature.h"
#include "../cpu/diagonal.h"
#include "../cpu/direction.h"
#include "../cpu/iterate.h"
#include "../cpu/kronecker.h"
#include "cpu_arguments.h"
#include "table.h"

namespace adaqn {
namespace {

std::vector<cpu::Rates> rates_of(const Tensors& params, const std::vector<int64_t>& group_sizes,
                                 const std::vector<double>& lr,
                                 const std::vector<double>& weight_decay,
                                 const OptionalTensor& lr_tensor,
                                 const OptionalTensor& weight_decay_tensor, const Place& place) {
  const size_t groups = group_sizes.size();
  const auto values = [&](const std::vector<double>& numbers, const OptionalTensor& tensor,
                          const Name& name) {
    if (tensor) return numbers_of(*tensor, name, place, static_cast<int64_t>(groups));
    if (numbers.size() != groups) fail(name, "expected ", groups, " numbers, got ", numbers.size());
    return numbers;
  };
  const auto steps = values(lr, lr_tensor, {"lr"});
  const auto decays = values(weight_decay, weight_decay_tensor, {"weight_decay"});
  std::vector<cpu::Rates> rates;
  size_t param = 0;
  int64_t end = 0;
  for (size_t group = 0; group < groups; ++group) {
    const int64_t size = group_sizes[group];
    if (size < 0 || static_cast<size_t>(size) > params.size() - param) {
      fail({"group_sizes"}, "expected sizes that sum to ", params.size());
    }
    for (int64_t i = 0; i < size; ++i) end += params[param++].numel();
    rates.push_back({end, steps[group], decays[group]});
  }
  if (param != params.size()) fail({"group_sizes"}, "expected sizes that sum to ", params.size());
  return rates;
}

// ---------------------------------------------------------------- the step

/// The rows of s or y: none, or at least one pair's and the free one.
Matrix pairs_of(const Tensor& tensor, const Name& name, const Place& place, int64_t columns,
                Dtype dtype) {
  const Matrix ring = ring_of(tensor, name, place, 0, columns, dtype);
  if (ring.rows == 1) fail(name, "expected no rows or at least 2, got 1");
  return ring;
}

/// Elements up to `end` follow those of the runs so far.
void append_run(std::vector<cpu::Averaging>& runs, const GroupAverages& own, int64_t end) {
  const bool same = !runs.empty() && own == GroupAverages{runs.back().beta, runs.back().keep,
                                                          runs.back().add, runs.back().eps};
  if (same) {
    runs.back().end = end;
  } else {
    runs.push_back({end, own.beta, own.keep, own.add, own.eps});
  }
}

std::vector<cpu::Averaging> runs_of(const Tensors& params, const AveragesArguments& arguments) {
  const auto each = averages_of_each(arguments, params.size());
  std::vector<cpu::Averaging> runs;
  int64_t end = 0;
  for (size_t i = 0; i < params.size(); ++i) {
    if (params[i].numel() > 0) append_run(runs, each[i], end += params[i].numel());
  }
  return runs;
}

std::vector<cpu::Averaging> runs_of(const Table& table, const AveragesArguments& arguments) {
  const auto each = table.averages_of_each(arguments);
  std::vector<cpu::Averaging> runs;
  for (size_t row = 0; row < each.size(); ++row) {
    const KroneckerMatrix& matrix = table.matrices()[row];
    append_run(runs, each[row], matrix.start + matrix.numel());
  }
  return runs;
}

cpu::Averages averages_of(std::vector<cpu::Averaging> runs, bool correct_bias,
                          const OptionalTensor& momentum, const OptionalTensor& accumulator,
                          const Place& place, int64_t size, Dtype dtype) {
  return {std::move(runs), correct_bias,
          optional_vector_of(momentum, {"momentum"}, place, size, dtype),
          optional_vector_of(accumulator, {"accumulator"}, place, size, dtype)};
}

cpu::Pass1 pass1_of(const cpu::Gradient& gradient, Dtype dtype, const Tensor& s_ring,
                    const Tensor& counters, const OptionalTensor& found_inf, double beta,
                    const Tensor& moments, const Tensor& projections, const Place& place) {
  const Matrix s = pairs_of(s_ring, {"s_ring"}, place, gradient.tensors.size(), dtype);
  const int64_t* words = counters_of(counters, place);
  check_pair_words(words, s.rows);
  return {gradient,
          dtype,
          s,
          words,
          number_or(found_inf, {"found_inf"}, place, 0),
          beta,
          doubles_of(moments, {"moments"}, place, {s.rows}),
          doubles_of(projections, {"projections"}, place, {s.rows + flag::count})};
}

cpu::Pass2 pass2_of(const cpu::Gradient& gradient, Dtype dtype, const Tensor& y_ring,
                    const Tensor& gram, const Tensor& counters, const Tensor& projections,
                    const cpu::Averages& averages, bool identity, const Tensor& fisher,
                    const Tensor& direction, const Tensor& images, const Place& place) {
  const int64_t size = gradient.tensors.size();
  const Matrix y = pairs_of(y_ring, {"y_ring"}, place, size, dtype);
  const Matrix f = ring_of(fisher, {"fisher"}, place, 0, size, dtype);
  const int64_t* words = counters_of(counters, place);
  check_pair_words(words, y.rows);
  check_gradient_words(words, f.rows);
  return {gradient,
          dtype,
          y,
          doubles_of(gram, {"gram"}, place, {y.rows + 1, y.rows}),
          words,
          doubles_of(projections, {"projections"}, place, {y.rows + flag::count}),
          averages,
          identity,
          f,
          vector_of(direction, {"direction"}, place, size, dtype),
          doubles_of(images, {"images"}, place, {y.rows + 1})};
}

cpu::Pass3 pass3_of(const Scattered& params, const Scattered& gradients,
                    const std::vector<cpu::Rates>& rates, const Tensor& s_ring, const Tensor& gram,
                    const Tensor& projections, const Tensor& images, const Tensor& direction,
                    double beta, double max_direction, int64_t fisher_size,
                    const OptionalTensor& iterate_sum, const Tensor& moments,
                    const Tensor& counters, const Place& place) {
  const Dtype dtype = vector_dtype(direction, {"direction"});
  const Matrix s = pairs_of(s_ring, {"s_ring"}, place, params.size(), dtype);
  int64_t* words = counters_of(counters, place);
  check_pair_words(words, s.rows);
  if (fisher_size < 1) fail({"fisher_size"}, "expected at least 1, got ", fisher_size);
  return {params,
          gradients,
          dtype,
          s,
          doubles_of(gram, {"gram"}, place, {s.rows + 1, s.rows}),
          doubles_of(projections, {"projections"}, place, {s.rows + flag::count}),
          doubles_of(images, {"images"}, place, {s.rows + 1}),
          vector_of(direction, {"direction"}, place, params.size(), dtype),
          beta,
          max_direction,
          rates,
          fisher_size,
          optional_vector_of(iterate_sum, {"iterate_sum"}, place, params.size(), dtype),
          doubles_of(moments, {"moments"}, place, {s.rows}),
          words};
}

void direction_step(const Tensors& params, const OptionalTensors& grads, const Tensor& s_ring,
                    const Tensor& y_ring, const Tensor& gram, const OptionalTensor& grad_scale,
                    const OptionalTensor& found_inf, bool maximize, double max_grad_norm,
                    double beta, double keep, double add, double eps, bool correct_bias,
                    double max_direction, const std::vector<int64_t>& group_sizes,
                    const std::vector<double>& lr, const std::vector<double>& weight_decay,
                    const OptionalTensor& lr_tensor, const OptionalTensor& weight_decay_tensor,
                    const OptionalTensor& momentum, const OptionalTensor& accumulator,
                    const Tensor& fisher, const OptionalTensor& iterate_sum,
                    const Tensor& direction, const Tensor& moments, const Tensor& projections,
                    const Tensor& images, const Tensor& counters) {
  const Place place(s_ring);
  const Dtype dtype = vector_dtype(direction, {"direction"});
  const Scattered vector = params_of(params, place);
  const cpu::Gradient gradient =
      gradient_of(params, grads, grad_scale, maximize, max_grad_norm, place);
  const auto rates =
      rates_of(params, group_sizes, lr, weight_decay, lr_tensor, weight_decay_tensor, place);
  const auto averages = averages_of({{vector.size(), beta, keep, add, eps}}, correct_bias, momentum,
                                    accumulator, place, vector.size(), dtype);
  const auto second = pass2_of(gradient, dtype, y_ring, gram, counters, projections, averages,
                               false, fisher, direction, images, place);
  const auto first =
      pass1_of(gradient, dtype, s_ring, counters, found_inf, beta, moments, projections, place);
  const auto third =
      pass3_of(vector, gradient.tensors, rates, s_ring, gram, projections, images, direction, beta,
               max_direction, std::max<int64_t>(second.fisher.rows, 1), iterate_sum, moments,
               counters, place);
  cpu::direction_pass1(parallel_for, first);
  cpu::direction_pass2(parallel_for, second);
  cpu::direction_pass3(parallel_for, third);
}

void direction_pass1(const Tensors& params, const OptionalTensors& grads, const Tensor& s_ring,
                     const Tensor& counters, const OptionalTensor& grad_scale,
                     const OptionalTensor& found_inf, bool maximize, double max_grad_norm,
                     double beta, const Tensor& moments, const Tensor& projections) {
  const Place place(s_ring);
  const cpu::Gradient gradient =
      gradient_of(params, grads, grad_scale, maximize, max_grad_norm, place);
  cpu::direction_pass1(parallel_for, pass1_of(gradient, state_dtype(params), s_ring, counters,
                                              found_inf, beta, moments, projections, place));
}

void direction_pass2(const Tensors& params, const OptionalTensors& grads, const Tensor& y_ring,
                     const Tensor& gram, const Tensor& counters, const Tensor& projections,
                     const OptionalTensor& grad_scale, bool maximize, double max_grad_norm,
                     const std::vector<double>& betas, const std::vector<double>& keeps,
                     const std::vector<double>& adds, const std::vector<double>& epsilons,
                     bool correct_bias, const std::vector<int64_t>& group_sizes, bool identity,
                     const OptionalTensor& momentum, const OptionalTensor& accumulator,
                     const Tensor& fisher, const Tensor& direction, const Tensor& images) {
  const Place place(y_ring);
  const Dtype dtype = vector_dtype(direction, {"direction"});
  const cpu::Gradient gradient =
      gradient_of(params, grads, grad_scale, maximize, max_grad_norm, place);
  const auto averages =
      averages_of(runs_of(params, {group_sizes, &betas, &keeps, &adds, &epsilons}), correct_bias,
                  momentum, accumulator, place, gradient.tensors.size(), dtype);
  cpu::direction_pass2(parallel_for,
                       pass2_of(gradient, dtype, y_ring, gram, counters, projections, averages,
                                identity, fisher, direction, images, place));
}

void direction_images(const Tensor& direction, const Tensor& y_ring, const Tensor& counters,
                      const Tensor& projections, const Tensor& images) {
  const Place place(direction);
  const Dtype dtype = vector_dtype(direction, {"direction"});
  const int64_t size = direction.numel();
  const Matrix y = pairs_of(y_ring, {"y_ring"}, place, size, dtype);
  const int64_t* words = counters_of(counters, place);
  check_pair_words(words, y.rows);
  cpu::direction_images(
      parallel_for, {dtype, vector_of(direction, {"direction"}, place, size, dtype), y,
                     doubles_of(projections, {"projections"}, place, {y.rows + flag::count}), words,
                     doubles_of(images, {"images"}, place, {y.rows + 1})});
}

void direction_pass3(const Tensors& params, const OptionalTensors& grads, const Tensor& s_ring,
                     const Tensor& gram, const Tensor& projections, const Tensor& images,
                     const Tensor& direction, double beta, double max_direction,
                     const std::vector<int64_t>& group_sizes, const std::vector<double>& lr,
                     const std::vector<double>& weight_decay, const OptionalTensor& lr_tensor,
                     const OptionalTensor& weight_decay_tensor, int64_t fisher_size,
                     const OptionalTensor& iterate_sum, const Tensor& moments,
                     const Tensor& counters) {
  const Place place(s_ring);
  const Scattered vector = params_of(params, place);
  const Scattered gradients = grads_of(grads, params, place);
  const auto rates =
      rates_of(params, group_sizes, lr, weight_decay, lr_tensor, weight_decay_tensor, place);
  cpu::direction_pass3(parallel_for, pass3_of(vector, gradients, rates, s_ring, gram, projections,
                                              images, direction, beta, max_direction, fisher_size,
                                              iterate_sum, moments, counters, place));
}

void diagonal_step(const Tensors& params, const OptionalTensors& grads,
                   const OptionalTensor& grad_scale, const OptionalTensor& found_inf, bool maximize,
                   double max_grad_norm, const std::vector<double>& betas,
                   const std::vector<double>& keeps, const std::vector<double>& adds,
                   const std::vector<double>& epsilons, bool correct_bias,
                   const std::vector<int64_t>& group_sizes, const std::vector<double>& lr,
                   const std::vector<double>& weight_decay, const OptionalTensor& lr_tensor,
                   const OptionalTensor& weight_decay_tensor, const OptionalTensor& momentum,
                   const OptionalTensor& accumulator, const Tensor& projections,
                   const Tensor& counters) {
  const Place place(counters);
  const Dtype dtype = state_dtype(params);
  const Scattered vector = params_of(params, place);
  const cpu::Gradient gradient =
      gradient_of(params, grads, grad_scale, maximize, max_grad_norm, place);
  const auto rates =
      rates_of(params, group_sizes, lr, weight_decay, lr_tensor, weight_decay_tensor, place);
  int64_t* words = counters_of(counters, place);
  check_gradient_words(words, 1);
  cpu::diagonal_step(
      parallel_for, {vector, gradient, dtype, number_or(found_inf, {"found_inf"}, place, 0),
                     averages_of(runs_of(params, {group_sizes, &betas, &keeps, &adds, &epsilons}),
                                 correct_bias, momentum, accumulator, place, vector.size(), dtype),
                     rates, doubles_of(projections, {"projections"}, place, {flag::count}), words});
}

// ---------------------------------------------------------------- the Kronecker matrix

int64_t worker_count() {
  uint32_t count = 1;
  TORCH_ERROR_CODE_CHECK(torch_get_num_threads(&count));
  return count;
}

void kronecker_accumulate(const Tensors& params, const OptionalTensors& grads, const Tensor& table,
                          const Tensor& projections, const Tensor& counters,
                          const OptionalTensor& grad_scale, bool maximize, double max_grad_norm,
                          const std::vector<int64_t>& group_sizes, const std::vector<double>& keeps,
                          const std::vector<double>& adds, double square_keep, int64_t call,
                          int64_t interval, const Tensor& accumulator, const Tensor& factors,
                          const Tensor& bases, const Tensor& square) {
  const Place place(accumulator);
  const Dtype dtype = vector_dtype(accumulator, {"accumulator"});
  const cpu::Gradient gradient =
      gradient_of(params, grads, grad_scale, maximize, max_grad_norm, place);
  const int64_t size = gradient.tensors.size();
  const Table matrices(table, size);
  matrices.check_params(params);
  const int64_t slots = projections.numel() - flag::count;
  if (slots < 0) fail({"projections"}, "expected at least ", int{flag::count}, " words");
  cpu::kronecker_accumulate(
      parallel_for,
      {gradient, dtype, matrices.matrices(), schedule_of(call, interval),
       averages_of(runs_of(params, {group_sizes, nullptr, &keeps, &adds, nullptr}), false, {},
                   accumulator, place, size, dtype),
       square_keep, flags_of(projections, place, slots), counters_of(counters, place),
       vector_of(factors, {"factors"}, place, matrices.squares(factors.numel()), dtype),
       vector_of(bases, {"bases"}, place, matrices.squares(bases.numel()), dtype),
       doubles_of(square, {"square"}, place, {1}), worker_count()});
}

void kronecker_apply(const Tensor& table, const Tensor& counters, const Tensor& accumulator,
                     const Tensor& bases, const std::vector<int64_t>& group_sizes,
                     const std::vector<double>& keeps, const std::vector<double>& epsilons,
                     bool correct_bias, int64_t pending, bool inverse, const Tensor& x) {
  const Place place(x);
  const Dtype dtype = vector_dtype(x, {"x"});
  const int64_t size = x.numel();
  const Table matrices(table, size);
  if (pending < 0 || pending > 1) fail({"pending"}, "expected 0 or 1, got ", pending);
  cpu::kronecker_apply(
      parallel_for,
      {dtype, matrices.matrices(), counters_of(counters, place),
       averages_of(runs_of(matrices, {group_sizes, nullptr, &keeps, nullptr, &epsilons}),
                   correct_bias, {}, accumulator, place, size, dtype),
       static_cast<int>(pending), inverse,
       vector_of(bases, {"bases"}, place, matrices.squares(bases.numel()), dtype),
       vector_of(x, {"x"}, place, size, dtype), worker_count()});
}

void kronecker_step(const Tensors& params, const OptionalTensors& grads, const Tensor& table,
                    const OptionalTensor& grad_scale, const OptionalTensor& found_inf,
                    bool maximize, double max_grad_norm, const std::vector<double>& betas,
                    const std::vector<double>& keeps, const std::vector<double>& adds,
                    const std::vector<double>& epsilons, bool correct_bias, double square_keep,
                    int64_t call, int64_t interval, const std::vector<int64_t>& group_sizes,
                    const std::vector<double>& lr, const std::vector<double>& weight_decay,
                    const OptionalTensor& lr_tensor, const OptionalTensor& weight_decay_tensor,
                    const OptionalTensor& momentum, const Tensor& accumulator,
                    const Tensor& factors, const Tensor& bases, const Tensor& square,
                    const Tensor& projections, const Tensor& counters) {
  const Place place(accumulator);
  const Dtype dtype = vector_dtype(accumulator, {"accumulator"});
  const Scattered vector = params_of(params, place);
  cpu::Gradient gradient = gradient_of(params, grads, grad_scale, maximize, max_grad_norm, place);
  const auto rates =
      rates_of(params, group_sizes, lr, weight_decay, lr_tensor, weight_decay_tensor, place);
  const Table matrices(table, vector.size());
  matrices.check_params(params);
  int64_t* words = counters_of(counters, place);
  check_gradient_words(words, 1);
  cpu::kronecker_step(
      parallel_for,
      {vector, gradient, dtype, number_or(found_inf, {"found_inf"}, place, 0), matrices.matrices(),
       schedule_of(call, interval),
       averages_of(runs_of(params, {group_sizes, &betas, &keeps, &adds, &epsilons}), correct_bias,
                   momentum, accumulator, place, vector.size(), dtype),
       square_keep, rates,
       vector_of(factors, {"factors"}, place, matrices.squares(factors.numel()), dtype),
       vector_of(bases, {"bases"}, place, matrices.squares(bases.numel()), dtype),
       doubles_of(square, {"square"}, place, {1}),
       doubles_of(projections, {"projections"}, place, {flag::count}), words, worker_count()});
}

// ---------------------------------------------------------------- the averaged iterate

void iterate_swap(const Tensors& params, const Tensor& iterate_sum, const Tensor& projections,
                  const Tensor& counters, const Tensor& saved) {
  const Place place(saved);
  const Dtype dtype = vector_dtype(saved, {"saved"});
  const Scattered vector = params_of(params, place);
  const int64_t flags = projections.numel() - flag::count;
  if (flags < 0) fail({"projections"}, "expected at least ", int{flag::count}, " words");
  const double* words = doubles_of(projections, {"projections"}, place, {flags + flag::count});
  cpu::iterate_swap(
      parallel_for,
      {vector, dtype, vector_of(iterate_sum, {"iterate_sum"}, place, vector.size(), dtype),
       words + flags, counters_of(counters, place),
       vector_of(saved, {"saved"}, place, vector.size(), dtype)});
}

void iterate_restore(const Tensors& params, const Tensor& saved) {
  const Place place(saved);
  const Dtype dtype = vector_dtype(saved, {"saved"});
  const Scattered vector = params_of(params, place);
  cpu::iterate_restore(parallel_for, vector, dtype,
                       vector_of(saved, {"saved"}, place, vector.size(), dtype));
}

// ---------------------------------------------------------------- the pair update

cpu::Displacement displacement_of(const Tensor& iterate_sum, const Tensor& anchor,
                                  const Place& place) {
  const Dtype dtype = vector_dtype(anchor, {"anchor"});
  const int64_t size = anchor.numel();
  return {dtype, vector_of(iterate_sum, {"iterate_sum"}, place, size, dtype),
          vector_of(anchor, {"anchor"}, place, size, dtype)};
}

void curvature_pass_a(const Tensor& fisher, const Tensor& iterate_sum, const Tensor& anchor,
                      const Tensor& counters, bool is_explicit, double damping,
                      const OptionalTensor& image, const Tensor& weights) {
  const Place place(fisher);
  const int64_t size = anchor.numel();
  const cpu::Displacement s = displacement_of(iterate_sum, anchor, place);
  const Matrix f = ring_of(fisher, {"fisher"}, place, 1, size, s.dtype);
  if (is_explicit && f.rows != 1) fail({"fisher"}, "expected 1 row, y itself, got ", f.rows);
  const int64_t* words = counters_of(counters, place);
  check_gradient_words(words, f.rows);
  cpu::curvature_pass_a(parallel_for, {s, f, words, is_explicit, damping,
                                       optional_vector_of(image, {"image"}, place, size, s.dtype),
                                       doubles_of(weights, {"weights"}, place, {f.rows + 1})});
}

void curvature_pass_b(const Tensor& fisher, const Tensor& iterate_sum, const Tensor& anchor,
                      const Tensor& counters, const Tensor& projections, const Tensor& weights,
                      const OptionalTensor& image, const OptionalTensor& momentum,
                      const Tensor& s_ring, const Tensor& y_ring, const Tensor& column) {
  const Place place(fisher);
  const int64_t size = anchor.numel();
  const cpu::Displacement displacement = displacement_of(iterate_sum, anchor, place);
  const Dtype dtype = displacement.dtype;
  const Matrix f = ring_of(fisher, {"fisher"}, place, 1, size, dtype);
  const Matrix s = ring_of(s_ring, {"s_ring"}, place, 2, size, dtype);
  const Matrix y = ring_of(y_ring, {"y_ring"}, place, s.rows, size, dtype);
  check_ring_shape(y_ring, {"y_ring"}, place, s.rows, size);
  check_dtype(y_ring, {"y_ring"}, s_ring.scalar_type());
  const int64_t* words = counters_of(counters, place);
  check_pair_words(words, s.rows);
  check_gradient_words(words, f.rows);
  cpu::curvature_pass_b(parallel_for,
                        {displacement, f, words, flags_of(projections, place, s.rows),
                         doubles_of(weights, {"weights"}, place, {f.rows + 1}),
                         optional_vector_of(image, {"image"}, place, size, dtype),
                         optional_vector_of(momentum, {"momentum"}, place, size, dtype), s, y,
                         doubles_of(column, {"column"}, place, {s.rows + 2})});
}

void curvature_commit(const Tensors& params, const Tensor& column, const Tensor& projections,
                      const OptionalTensor& monitored_loss, double min_curvature,
                      double max_increase, double max_growth, const Tensor& gram,
                      const Tensor& moments, const Tensor& losses, const Tensor& anchor,
                      const Tensor& iterate_sum, const OptionalTensor& momentum,
                      const Tensor& counters) {
  const Place place(anchor);
  const cpu::Displacement state = displacement_of(iterate_sum, anchor, place);
  const Scattered vector = params_of(params, place);
  const int64_t slots = check_rows(gram, {"gram"}, 3) - 1;
  const double monitored = number_or(monitored_loss, {"monitored_loss"}, place, 0);
  int64_t* words = counters_of(counters, place);
  check_pair_words(words, slots);
  cpu::curvature_commit(
      parallel_for, {vector,
                     state.dtype,
                     static_cast<int>(slots),
                     doubles_of(column, {"column"}, place, {slots + 2}),
                     flags_of(projections, place, slots),
                     monitored_loss ? &monitored : nullptr,
                     {min_curvature, max_increase, max_growth},
                     doubles_of(gram, {"gram"}, place, {slots + 1, slots}),
                     doubles_of(moments, {"moments"}, place, {slots}),
                     doubles_of(losses, {"losses"}, place, {loss::count}),
                     vector_of(anchor, {"anchor"}, place, vector.size(), state.dtype),
                     vector_of(iterate_sum, {"iterate_sum"}, place, vector.size(), state.dtype),
                     optional_vector_of(momentum, {"momentum"}, place, vector.size(), state.dtype),
                     words});
}

}  // namespace
}  // namespace adaqn

STABLE_TORCH_LIBRARY_IMPL(adaqn, CPU, m) {
  m.impl("direction_step", TORCH_BOX(&adaqn::direction_step));
  m.impl("direction_pass1", TORCH_BOX(&adaqn::direction_pass1));
  m.impl("direction_pass2", TORCH_BOX(&adaqn::direction_pass2));
  m.impl("direction_images", TORCH_BOX(&adaqn::direction_images));
  m.impl("direction_pass3", TORCH_BOX(&adaqn::direction_pass3));
  m.impl("diagonal_step", TORCH_BOX(&adaqn::diagonal_step));
  m.impl("kronecker_accumulate", TORCH_BOX(&adaqn::kronecker_accumulate));
  m.impl("kronecker_apply", TORCH_BOX(&adaqn::kronecker_apply));
  m.impl("kronecker_step", TORCH_BOX(&adaqn::kronecker_step));
  m.impl("iterate_swap", TORCH_BOX(&adaqn::iterate_swap));
  m.impl("iterate_restore", TORCH_BOX(&adaqn::iterate_restore));
  m.impl("curvature_pass_a", TORCH_BOX(&adaqn::curvature_pass_a));
  m.impl("curvature_pass_b", TORCH_BOX(&adaqn::curvature_pass_b));
  m.impl("curvature_commit", TORCH_BOX(&adaqn::curvature_commit));
}
