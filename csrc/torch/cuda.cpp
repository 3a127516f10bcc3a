// The operations of adaqn_cuda/ops.py on CUDA devices, but for those of L-BFGS.
#include <torch/csrc/stable/library.h>

#include "cuda_arguments.h"
#include "table.h"

namespace adaqn {
namespace {

cuda::Scaling scaling_of(const OptionalTensor& grad_scale, const OptionalTensor& found_inf,
                         bool maximize, double max_grad_norm, const Place& place) {
  const void* scale = number_of(grad_scale, {"grad_scale"}, place, ScalarType::Float);
  const void* found = number_of(found_inf, {"found_inf"}, place, ScalarType::Float);
  return {static_cast<const float*>(scale), static_cast<const float*>(found), maximize,
          max_grad_norm};
}

const double* rate_tensor_of(const OptionalTensor& tensor, const std::vector<double>& values,
                             const Name& name, const Place& place, size_t groups) {
  if (!tensor) {
    if (values.size() != groups) fail(name, "expected ", groups, " numbers, got ", values.size());
    return nullptr;
  }
  check_shape(*tensor, name, place, {static_cast<int64_t>(groups)});
  check_dtype(*tensor, name, ScalarType::Double);
  return static_cast<const double*>(tensor->data_ptr());
}

cuda::Rates rates_of(const std::vector<int64_t>& group_sizes, const std::vector<double>& lr,
                     const std::vector<double>& weight_decay, const OptionalTensor& lr_tensor,
                     const OptionalTensor& weight_decay_tensor, const Place& place) {
  const size_t groups = group_sizes.size();
  return {lr.data(), weight_decay.data(), rate_tensor_of(lr_tensor, lr, {"lr"}, place, groups),
          rate_tensor_of(weight_decay_tensor, weight_decay, {"weight_decay"}, place, groups)};
}

// ---------------------------------------------------------------- the step

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
  const OnDevice device(s_ring);
  const Place place(s_ring);
  List list(device, place, params, &grads, &group_sizes, Use::elements);
  list.check_size(direction.numel());
  StateBuilder builder = state_like(direction, {"direction"}, place);
  builder.s_ring(s_ring).y_ring(y_ring).gram(gram).fisher(fisher).counters(counters);
  builder.projections(projections).images(images).direction(direction, {"direction"});
  builder.iterate_sum(iterate_sum).accumulator(accumulator).momentum(momentum).moments(moments);
  const State state = *builder;
  const auto scaling = scaling_of(grad_scale, found_inf, maximize, max_grad_norm, place);
  const auto rates = rates_of(group_sizes, lr, weight_decay, lr_tensor, weight_decay_tensor, place);
  device.run("direction_step", list.parameters(), state, counters, [&](const Queue& queue) {
    return cuda::direction_step(list.parameters(), state, scaling,
                                {beta, keep, add, eps, correct_bias}, max_direction, rates, queue);
  });
  list.write_back();
}

void direction_pass1(const Tensors& params, const OptionalTensors& grads, const Tensor& s_ring,
                     const Tensor& counters, const OptionalTensor& grad_scale,
                     const OptionalTensor& found_inf, bool maximize, double max_grad_norm,
                     double beta, const Tensor& moments, const Tensor& projections) {
  const OnDevice device(s_ring);
  const Place place(s_ring);
  const List list(device, place, params, &grads, nullptr, Use::sizes);
  StateBuilder builder(place, list.state_type(), list.numel());
  builder.s_ring(s_ring).counters(counters).moments(moments).projections(projections);
  const State state = *builder;
  const auto scaling = scaling_of(grad_scale, found_inf, maximize, max_grad_norm, place);
  device.run("direction_pass1", list.parameters(), state, counters, [&](const Queue& queue) {
    return cuda::direction_pass1(list.parameters(), state, scaling, beta, queue);
  });
}

void direction_pass2(const Tensors& params, const OptionalTensors& grads, const Tensor& y_ring,
                     const Tensor& gram, const Tensor& counters, const Tensor& projections,
                     const OptionalTensor& grad_scale, bool maximize, double max_grad_norm,
                     const std::vector<double>& betas, const std::vector<double>& keeps,
                     const std::vector<double>& adds, const std::vector<double>& epsilons,
                     bool correct_bias, const std::vector<int64_t>& group_sizes, bool identity,
                     const OptionalTensor& momentum, const OptionalTensor& accumulator,
                     const Tensor& fisher, const Tensor& direction, const Tensor& images) {
  const OnDevice device(y_ring);
  const Place place(y_ring);
  const AverageKinds kinds(
      averages_of_each({group_sizes, &betas, &keeps, &adds, &epsilons}, params.size()),
      correct_bias);
  List list(device, place, params, &grads, nullptr, Use::sizes);
  list.set_kinds(kinds);
  list.check_size(direction.numel());
  StateBuilder builder = state_like(direction, {"direction"}, place);
  builder.y_ring(y_ring).gram(gram).fisher(fisher).counters(counters).projections(projections);
  builder.images(images).direction(direction, {"direction"}).accumulator(accumulator);
  builder.momentum(momentum);
  const State state = *builder;
  const auto scaling = scaling_of(grad_scale, std::nullopt, maximize, max_grad_norm, place);
  device.run("direction_pass2", list.parameters(), state, counters, [&](const Queue& queue) {
    return cuda::direction_pass2(list.parameters(), state, scaling, kinds.by_kind(), identity,
                                 queue);
  });
}

void direction_images(const Tensor& direction, const Tensor& y_ring, const Tensor& counters,
                      const Tensor& projections, const Tensor& images) {
  const OnDevice device(y_ring);
  const Place place(y_ring);
  StateBuilder builder = state_like(direction, {"direction"}, place);
  builder.any_history().y_ring(y_ring).counters(counters).projections(projections);
  builder.images(images).direction(direction, {"direction"});
  const State state = *builder;
  device.run("direction_images", {}, state, counters,
             [&](const Queue& queue) { return cuda::direction_images(state, queue); });
}

void direction_pass3(const Tensors& params, const OptionalTensors& grads, const Tensor& s_ring,
                     const Tensor& gram, const Tensor& projections, const Tensor& images,
                     const Tensor& direction, double beta, double max_direction,
                     const std::vector<int64_t>& group_sizes, const std::vector<double>& lr,
                     const std::vector<double>& weight_decay, const OptionalTensor& lr_tensor,
                     const OptionalTensor& weight_decay_tensor, int64_t fisher_size,
                     const OptionalTensor& iterate_sum, const Tensor& moments,
                     const Tensor& counters) {
  const OnDevice device(s_ring);
  const Place place(s_ring);
  List list(device, place, params, &grads, &group_sizes, Use::elements);
  list.check_size(direction.numel());
  if (fisher_size < 1) fail({"fisher_size"}, "expected at least 1, got ", fisher_size);
  StateBuilder builder = state_like(direction, {"direction"}, place);
  builder.s_ring(s_ring).gram(gram).counters(counters).projections(projections).images(images);
  builder.direction(direction, {"direction"}).iterate_sum(iterate_sum).moments(moments);
  (*builder).fisher_size = fisher_size;
  const State state = *builder;
  const auto rates = rates_of(group_sizes, lr, weight_decay, lr_tensor, weight_decay_tensor, place);
  device.run("direction_pass3", list.parameters(), state, counters, [&](const Queue& queue) {
    return cuda::direction_pass3(list.parameters(), state, beta, max_direction, rates, queue);
  });
  list.write_back();
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
  const OnDevice device(counters);
  const Place place(counters);
  List list(device, place, params, &grads, &group_sizes, Use::elements);
  const AverageKinds kinds(
      averages_of_each({group_sizes, &betas, &keeps, &adds, &epsilons}, params.size()),
      correct_bias);
  list.set_kinds(kinds);
  StateBuilder builder(place, list.state_type(), list.numel());
  builder.projections(projections).counters(counters).accumulator(accumulator).momentum(momentum);
  const State state = *builder;
  const auto scaling = scaling_of(grad_scale, found_inf, maximize, max_grad_norm, place);
  const auto rates = rates_of(group_sizes, lr, weight_decay, lr_tensor, weight_decay_tensor, place);
  device.run("diagonal_step", list.parameters(), state, counters, [&](const Queue& queue) {
    return cuda::diagonal_step(list.parameters(), state, scaling, kinds.by_kind(), rates, queue);
  });
  list.write_back();
}

// ---------------------------------------------------------------- the Kronecker matrix

/// What kernels count in int32.
void check_sizes(const Table& table) {
  constexpr int64_t longest_piece = 46340;  // of which the square is an int32
  constexpr int64_t longest_side = std::numeric_limits<int32_t>::max();
  int64_t row = 0;
  for (const KroneckerMatrix& matrix : table.matrices()) {
    const Name name{"table", row++};
    if (!matrix.factored()) continue;
    const int64_t longest = std::max(matrix.rows.largest(), matrix.columns.largest());
    if (longest > longest_piece) {
      fail(name, "expected pieces of at most ", longest_piece, " on a CUDA device, got ", longest);
    }
    if (std::max(matrix.rows.length, matrix.columns.length) > longest_side) {
      fail(name, "expected sides of at most ", longest_side, " on a CUDA device");
    }
  }
}

/// Checked pointers of the matrix; `factors` and `square` where an operation has them.
cuda::Kronecker kronecker_of(const Table& table, const AverageKinds& kinds,
                             const StateBuilder& builder, const Tensor* factors,
                             const Tensor& bases, const Tensor* square, double square_keep,
                             const KroneckerSchedule& schedule) {
  check_sizes(table);
  cuda::Kronecker kronecker{};
  kronecker.table = table.words();
  kronecker.matrices = static_cast<int64_t>(table.matrices().size());
  kronecker.bases = builder.vector(bases, {"bases"}, table.squares(bases.numel()));
  if (factors) {
    kronecker.factors = builder.vector(*factors, {"factors"}, table.squares(factors->numel()));
  }
  if (square) kronecker.square = builder.doubles(*square, {"square"}, {1});
  kronecker.square_keep = square_keep;
  kronecker.kinds = kinds.of_each().data();
  kronecker.call = schedule.call;
  kronecker.interval = schedule.interval;
  return kronecker;
}

void kronecker_accumulate(const Tensors& params, const OptionalTensors& grads, const Tensor& table,
                          const Tensor& projections, const Tensor& counters,
                          const OptionalTensor& grad_scale, bool maximize, double max_grad_norm,
                          const std::vector<int64_t>& group_sizes, const std::vector<double>& keeps,
                          const std::vector<double>& adds, double square_keep, int64_t call,
                          int64_t interval, const Tensor& accumulator, const Tensor& factors,
                          const Tensor& bases, const Tensor& square) {
  const OnDevice device(accumulator);
  const Place place(accumulator);
  const List list(device, place, params, &grads, nullptr, Use::sizes);
  list.check_size(accumulator.numel());
  const Table matrices(table, list.numel());
  matrices.check_params(params);
  const AverageKinds kinds(
      matrices.averages_of_each({group_sizes, nullptr, &keeps, &adds, nullptr}), false);
  StateBuilder builder = state_like(accumulator, {"accumulator"}, place);
  builder.any_history().slots(projections.numel() - flag::count).projections(projections);
  builder.counters(counters).accumulator(accumulator);
  const State state = *builder;
  const auto kronecker = kronecker_of(matrices, kinds, builder, &factors, bases, &square,
                                      square_keep, schedule_of(call, interval));
  const auto scaling = scaling_of(grad_scale, std::nullopt, maximize, max_grad_norm, place);
  device.run("kronecker_accumulate", workspace_bytes(list.parameters(), state, kronecker), counters,
             [&](const Queue& queue) {
               return cuda::kronecker_accumulate(list.parameters(), state, kronecker, scaling,
                                                 kinds.by_kind(), queue);
             });
}

void kronecker_apply(const Tensor& table, const Tensor& counters, const Tensor& accumulator,
                     const Tensor& bases, const std::vector<int64_t>& group_sizes,
                     const std::vector<double>& keeps, const std::vector<double>& epsilons,
                     bool correct_bias, int64_t pending, bool inverse, const Tensor& x) {
  const OnDevice device(x);
  const Place place(x);
  const Table matrices(table, x.numel());
  if (pending < 0 || pending > 1) fail({"pending"}, "expected 0 or 1, got ", pending);
  StateBuilder builder = state_like(x, {"x"}, place);
  builder.counters(counters).accumulator(accumulator).direction(x, {"x"});
  const State state = *builder;
  const AverageKinds kinds(
      matrices.averages_of_each({group_sizes, nullptr, &keeps, nullptr, &epsilons}), correct_bias);
  const auto kronecker = kronecker_of(matrices, kinds, builder, nullptr, bases, nullptr, 0, {1, 1});
  device.run("kronecker_apply", workspace_bytes({}, state, kronecker), counters,
             [&](const Queue& queue) {
               return cuda::kronecker_apply(state, kronecker, kinds.by_kind(),
                                            static_cast<int>(pending), inverse, queue);
             });
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
  const OnDevice device(accumulator);
  const Place place(accumulator);
  List list(device, place, params, &grads, &group_sizes, Use::elements);
  list.check_size(accumulator.numel());
  const Table matrices(table, list.numel());
  matrices.check_params(params);
  const AverageKinds kinds(
      matrices.averages_of_each({group_sizes, &betas, &keeps, &adds, &epsilons}), correct_bias);
  StateBuilder builder = state_like(accumulator, {"accumulator"}, place);
  builder.projections(projections).counters(counters).accumulator(accumulator).momentum(momentum);
  const State state = *builder;
  const auto kronecker = kronecker_of(matrices, kinds, builder, &factors, bases, &square,
                                      square_keep, schedule_of(call, interval));
  const auto scaling = scaling_of(grad_scale, found_inf, maximize, max_grad_norm, place);
  const auto rates = rates_of(group_sizes, lr, weight_decay, lr_tensor, weight_decay_tensor, place);
  device.run("kronecker_step", workspace_bytes(list.parameters(), state, kronecker), counters,
             [&](const Queue& queue) {
               return cuda::kronecker_step(list.parameters(), state, kronecker, scaling,
                                           kinds.by_kind(), rates, queue);
             });
  list.write_back();
}

// ---------------------------------------------------------------- the averaged iterate

void iterate_swap(const Tensors& params, const Tensor& iterate_sum, const Tensor& projections,
                  const Tensor& counters, const Tensor& saved) {
  const OnDevice device(saved);
  const Place place(saved);
  List list(device, place, params, nullptr, nullptr, Use::elements);
  list.check_size(saved.numel());
  StateBuilder builder = state_like(saved, {"saved"}, place);
  builder.slots(projections.numel() - flag::count).projections(projections).counters(counters);
  builder.iterate_sum(iterate_sum).direction(saved, {"saved"});
  const State state = *builder;
  device.run("iterate_swap", list.parameters(), state, counters, [&](const Queue& queue) {
    return cuda::iterate_swap(list.parameters(), state, queue);
  });
  list.write_back();
}

void iterate_restore(const Tensors& params, const Tensor& saved) {
  const OnDevice device(saved);
  const Place place(saved);
  List list(device, place, params, nullptr, nullptr, Use::elements);
  list.check_size(saved.numel());
  StateBuilder builder = state_like(saved, {"saved"}, place);
  builder.direction(saved, {"saved"});
  const State state = *builder;
  device.run("iterate_restore", list.parameters(), state, saved, [&](const Queue& queue) {
    return cuda::iterate_restore(list.parameters(), state, queue);
  });
  list.write_back();
}

// ---------------------------------------------------------------- the pair update

void curvature_pass_a(const Tensor& fisher, const Tensor& iterate_sum, const Tensor& anchor,
                      const Tensor& counters, bool explicit_y, double damping,
                      const OptionalTensor& image, const Tensor& weights) {
  const OnDevice device(fisher);
  const Place place(fisher);
  StateBuilder builder = state_like(anchor, {"anchor"}, place);
  builder.fisher(fisher, 1).iterate_sum(iterate_sum).anchor(anchor).counters(counters);
  builder.image(image).weights(weights);
  const State state = *builder;
  device.run("curvature_pass_a", {}, state, counters, [&](const Queue& queue) {
    return cuda::curvature_pass_a(state, explicit_y, damping, queue);
  });
}

void curvature_pass_b(const Tensor& fisher, const Tensor& iterate_sum, const Tensor& anchor,
                      const Tensor& counters, const Tensor& projections, const Tensor& weights,
                      const OptionalTensor& image, const OptionalTensor& momentum,
                      const Tensor& s_ring, const Tensor& y_ring, const Tensor& column) {
  const OnDevice device(fisher);
  const Place place(fisher);
  StateBuilder builder = state_like(anchor, {"anchor"}, place);
  builder.fisher(fisher, 1).iterate_sum(iterate_sum).anchor(anchor).counters(counters);
  builder.s_ring(s_ring).y_ring(y_ring).column(column).weights(weights).image(image);
  builder.momentum(momentum).projections(projections);
  const State state = *builder;
  if (state.slots == 0) fail({"s_ring"}, "expected at least 2 rows, got 0");
  device.run("curvature_pass_b", {}, state, counters,
             [&](const Queue& queue) { return cuda::curvature_pass_b(state, queue); });
}

void curvature_commit(const Tensors& params, const Tensor& column, const Tensor& projections,
                      const OptionalTensor& monitored_loss, double min_curvature,
                      double max_increase, double max_growth, const Tensor& gram,
                      const Tensor& moments, const Tensor& losses, const Tensor& anchor,
                      const Tensor& iterate_sum, const OptionalTensor& momentum,
                      const Tensor& counters) {
  const OnDevice device(anchor);
  const Place place(anchor);
  List list(device, place, params, nullptr, nullptr, Use::elements);
  list.check_size(anchor.numel());
  StateBuilder builder = state_like(anchor, {"anchor"}, place);
  builder.slots(check_rows(gram, {"gram"}, 3) - 1).gram(gram).column(column).counters(counters);
  builder.moments(moments).iterate_sum(iterate_sum).anchor(anchor).momentum(momentum);
  builder.projections(projections);
  State& state = *builder;
  state.losses = builder.doubles(losses, {"losses"}, {loss::count});
  const void* monitored = number_of(monitored_loss, {"monitored_loss"}, place, ScalarType::Double);
  device.run("curvature_commit", list.parameters(), state, counters, [&](const Queue& queue) {
    return cuda::curvature_commit(list.parameters(), state, static_cast<const double*>(monitored),
                                  min_curvature, max_increase, max_growth, queue);
  });
  list.write_back();
}

}  // namespace
}  // namespace adaqn

/// Loads the kernels for these types, values of cuda::Type, on a device: of L-BFGS (`search`), or
/// of the step and the pair update.  Null, or what the CUDA runtime says against it.
extern "C" __attribute__((visibility("default"))) const char* adaqn_cuda_load(
    int device, int vectors, int pairs, int fisher, int search, int has_pairs, int kronecker) {
  using namespace adaqn::cuda;
  const Kinds kinds{Type(vectors), Type(pairs), Type(fisher)};
  cudaError_t error = make_current(device);
  if (error == cudaSuccess) {
    error =
        search ? load_search_kernels(kinds, kronecker) : load_kernels(kinds, has_pairs, kronecker);
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

STABLE_TORCH_LIBRARY_IMPL(adaqn, CUDA, m) {
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
