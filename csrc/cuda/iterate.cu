// The averaged iterate: put in the parameters' place for the monitor, and undone to the bit.
#include "control.cuh"
#include "launch.cuh"
#include "load.cuh"

namespace adaqn::cuda {
namespace {

/// direction = w;  w = w_n, which counts the current iterate if its step is going to be accepted.
template <class T, int Capacity>
ADAQN_PASS_KERNEL swap_kernel(const __grid_constant__ Segments<Capacity> table,
                              const __grid_constant__ State state) {
  const bool accepted = accepts_step(state);
  const int64_t count = state.counters[counter::iterates] + accepted;
  const T share = share_of_one<T>(count);
  const T* iterate_sum = static_cast<const T*>(state.iterate_sum);
  T* saved = static_cast<T*>(state.direction);
  Cursor<Capacity> cursor(table);
  visit_segments<T, T, kPacksAtATime>(cursor, Order::forward, [&](const auto& at) {
    constexpr int W = kPackWidth<decltype(at)>;
    T w[W], sum[W];
    load_param(cursor, at, w);
    load(iterate_sum, at, sum);
    store(saved, at, w);
    if (count == 0) return;
#pragma unroll
    for (int j = 0; j < W; ++j) w[j] = share * (accepted ? sum[j] + w[j] : sum[j]);
    store_param(cursor, at, w);
  });
}

template <class T, int Capacity>
ADAQN_PASS_KERNEL restore_kernel(const __grid_constant__ Segments<Capacity> table,
                                 const __grid_constant__ State state) {
  const T* saved = static_cast<const T*>(state.direction);
  Cursor<Capacity> cursor(table);
  visit_segments<T, T, kPacksAtATime>(cursor, Order::backward, [&](const auto& at) {
    T w[kPackWidth<decltype(at)>];
    load(saved, at, w);
    store_param(cursor, at, w);
  });
}

}  // namespace

cudaError_t iterate_swap(const Parameters& list, const State& state, const Queue& queue) {
  return for_each_simple_launch(list, state,
                                [&](auto vectors, const auto& table, const Shape& shape) {
                                  using T = decltype(vectors);
                                  return launch(swap_kernel<T, kCapacity<decltype(table)>>, shape,
                                                queue.stream, table, state);
                                });
}

cudaError_t iterate_restore(const Parameters& list, const State& state, const Queue& queue) {
  return for_each_simple_launch(list, state,
                                [&](auto vectors, const auto& table, const Shape& shape) {
                                  using T = decltype(vectors);
                                  return launch(restore_kernel<T, kCapacity<decltype(table)>>,
                                                shape, queue.stream, table, state);
                                });
}

cudaError_t load_iterate(const Kinds& kinds) {
  return with_types(kinds.vectors, kinds.vectors, [&](auto types) {
    using T = typename decltype(types)::T;
    return for_capacities<kSmallTable, kLargeTable>([](auto capacity) {
      constexpr int C = decltype(capacity)::value;
      return load(swap_kernel<T, C>, restore_kernel<T, C>);
    });
  });
}

}  // namespace adaqn::cuda
