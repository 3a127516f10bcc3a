// The operations of L-BFGS with step control on CUDA devices.
#include <torch/csrc/stable/library.h>

#include "cuda_arguments.h"

namespace adaqn {
namespace {

using cuda::Search;

/// What an operation has beside State; a vector that it does not use stays null.
class SearchBuilder {
 public:
  SearchBuilder(const StateBuilder& state, const Tensor& words) : state_(state) {
    search_.words = state.doubles(words, {"words"}, {word::count});
  }

  SearchBuilder& trial(const Tensor& tensor) {
    search_.trial = state_.vector(tensor, {"trial"});
    return *this;
  }
  SearchBuilder& gradient(const Tensor& tensor) {
    search_.gradient = state_.vector(tensor, {"gradient"});
    return *this;
  }
  SearchBuilder& origin(const Tensor& tensor) {
    search_.origin = state_.vector(tensor, {"origin"});
    return *this;
  }
  SearchBuilder& residual(const Tensor& tensor) {
    search_.residual = state_.vector(tensor, {"residual"});
    return *this;
  }
  SearchBuilder& scales(const Tensor& tensor, int64_t slots) {
    search_.scales = state_.doubles(tensor, {"scales"}, {slots});
    return *this;
  }

  const Search& operator*() const { return search_; }

 private:
  const StateBuilder& state_;
  Search search_{};
};

/// Calls enqueue(queue) with a workspace for an operation on a search.
template <class Enqueue>
void run(const OnDevice& device, const char* operation, const Parameters& list, const State& state,
         const Tensor& like, Enqueue enqueue) {
  device.run(operation, cuda::secant_workspace_bytes(list, state), like, enqueue);
}

/// The loss, of any floating-point type.
cuda::Number loss_of(const Tensor& loss, const Place& place) {
  place.check(loss, {"loss"});
  if (loss.numel() != 1) fail({"loss"}, "expected one number");
  return {loss.data_ptr(), type_of(loss, {"loss"})};
}

void check_has_rows(const State& state, const Name& name) {
  if (state.slots == 0) fail(name, "expected at least one row");
}

void secant_measure(const Tensors& params, const OptionalTensors& grads, const Tensor& loss,
                    bool maximize, const Tensor& direction, const Tensor& trial,
                    const Tensor& words) {
  const OnDevice device(trial);
  const Place place(trial);
  const List list(device, place, params, &grads, nullptr, Use::sizes);
  list.check_size(trial.numel());
  StateBuilder builder = state_like(trial, {"trial"}, place);
  builder.direction(direction, {"direction"});
  const Search search = *SearchBuilder(builder, words).trial(trial);
  const State state = *builder;
  const cuda::Number number = loss_of(loss, place);
  run(device, "secant_measure", list.parameters(), state, words, [&](const Queue& queue) {
    return cuda::secant_measure(list.parameters(), state, search, number, maximize, queue);
  });
}

void secant_decide(double decrease, double noise, double tolerance_grad, double tolerance_change,
                   int64_t max_trials, int64_t max_iter, const Tensor& counters,
                   const Tensor& words) {
  const OnDevice device(words);
  const Place place(words);
  StateBuilder builder(place, Type::f64, 0);
  builder.counters(counters);
  const Search search = *SearchBuilder(builder, words);
  const State state = *builder;
  const SearchRule rule{decrease, noise, tolerance_grad, tolerance_change, max_trials, max_iter};
  device.run("secant_decide", 0, words,
             [&](const Queue& queue) { return cuda::secant_decide(state, search, rule, queue); });
}

void secant_keep(const Tensors& params, const Tensor& words, const Tensor& origin) {
  const OnDevice device(origin);
  const Place place(origin);
  const List list(device, place, params, nullptr, nullptr, Use::elements);
  list.check_size(origin.numel());
  StateBuilder builder = state_like(origin, {"origin"}, place);
  const Search search = *SearchBuilder(builder, words).origin(origin);
  const State state = *builder;
  device.run("secant_keep", 0, words, [&](const Queue& queue) {
    return cuda::secant_keep(list.parameters(), state, search, queue);
  });
}

void secant_pair(const Tensor& trial, const Tensor& direction, double absolute, double relative,
                 bool self_scaled, const Tensor& gradient, const Tensor& s_ring,
                 const Tensor& y_ring, const Tensor& gram, const Tensor& scales,
                 const Tensor& projections, const Tensor& counters, const Tensor& words) {
  const OnDevice device(trial);
  const Place place(trial);
  StateBuilder builder = state_like(trial, {"trial"}, place);
  builder.any_history().s_ring(s_ring).y_ring(y_ring).gram(gram).projections(projections);
  builder.counters(counters).direction(direction, {"direction"});
  const State state = *builder;
  check_has_rows(state, {"s_ring"});
  SearchBuilder buffers(builder, words);
  buffers.trial(trial).gradient(gradient).scales(scales, state.slots);
  run(device, "secant_pair", {}, state, words, [&](const Queue& queue) {
    return cuda::secant_pair(state, *buffers, {absolute, relative, self_scaled}, queue);
  });
}

void secant_residual(const Tensor& gradient, const Tensor& y_ring, const Tensor& gram,
                     const Tensor& counters, const Tensor& projections, const Tensor& words,
                     bool identity, const Tensor& residual, const Tensor& images) {
  const OnDevice device(gradient);
  const Place place(gradient);
  StateBuilder builder = state_like(gradient, {"gradient"}, place);
  builder.any_history().y_ring(y_ring).gram(gram).counters(counters).projections(projections);
  builder.images(images);
  const State state = *builder;
  check_has_rows(state, {"y_ring"});
  SearchBuilder buffers(builder, words);
  buffers.gradient(gradient).residual(residual);
  run(device, "secant_residual", {}, state, words,
      [&](const Queue& queue) { return cuda::secant_residual(state, *buffers, identity, queue); });
}

void secant_combine(const Tensor& gradient, const Tensor& s_ring, const Tensor& gram,
                    const Tensor& scales, const Tensor& counters, const Tensor& projections,
                    const Tensor& images, const Tensor& residual, double lr, double first,
                    const Tensor& direction, const Tensor& words) {
  const OnDevice device(gradient);
  const Place place(gradient);
  StateBuilder builder = state_like(gradient, {"gradient"}, place);
  builder.any_history().s_ring(s_ring).gram(gram).counters(counters).projections(projections);
  builder.images(images).direction(direction, {"direction"});
  const State state = *builder;
  check_has_rows(state, {"s_ring"});
  SearchBuilder buffers(builder, words);
  buffers.gradient(gradient).residual(residual).scales(scales, state.slots);
  run(device, "secant_combine", {}, state, words,
      [&](const Queue& queue) { return cuda::secant_combine(state, *buffers, lr, first, queue); });
}

void secant_move(const Tensors& params, const Tensor& origin, const Tensor& direction,
                 std::optional<double> step, double limit, const Tensor& words) {
  const OnDevice device(origin);
  const Place place(origin);
  List list(device, place, params, nullptr, nullptr, Use::elements);
  list.check_size(origin.numel());
  StateBuilder builder = state_like(origin, {"origin"}, place);
  builder.direction(direction, {"direction"});
  const Search search = *SearchBuilder(builder, words).origin(origin);
  const State state = *builder;
  device.run("secant_move", 0, words, [&](const Queue& queue) {
    return cuda::secant_move(list.parameters(), state, search, step ? &*step : nullptr, limit,
                             queue);
  });
  list.write_back();
}

}  // namespace
}  // namespace adaqn

STABLE_TORCH_LIBRARY_IMPL(adaqn, CUDA, m) {
  m.impl("secant_measure", TORCH_BOX(&adaqn::secant_measure));
  m.impl("secant_decide", TORCH_BOX(&adaqn::secant_decide));
  m.impl("secant_keep", TORCH_BOX(&adaqn::secant_keep));
  m.impl("secant_pair", TORCH_BOX(&adaqn::secant_pair));
  m.impl("secant_residual", TORCH_BOX(&adaqn::secant_residual));
  m.impl("secant_combine", TORCH_BOX(&adaqn::secant_combine));
  m.impl("secant_move", TORCH_BOX(&adaqn::secant_move));
}
