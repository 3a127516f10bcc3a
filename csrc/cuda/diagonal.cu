// The step without pairs: pass 1 for the flags, and one pass over g, v, m and w.
//
// As kernels of their own or as parts of one cooperative kernel with a grid barrier in between.
// Nothing is kept from one pass to the other but the flags, so there is no direction vector.
#include <cooperative_groups.h>

#include "averages.cuh"
#include "control.cuh"
#include "descent.cuh"
#include "launch.cuh"
#include "load.cuh"
#include "step.cuh"

namespace adaqn::cuda {
namespace {

/// g enters v and m;  w = (1 - lr weight_decay) w - lr D q, if the step is accepted.
template <class T, int Capacity>
__device__ void diagonal_descent(const Segments<Capacity>& table, const State& state,
                                 const Scaling& scaling, const Averages& averages,
                                 const TableRates& rates, const StepMemory<T>& memory) {
  if (!memory.accepted()) return;
  const T scale = T(scale_of(scaling) * memory.weights->clip);
  if (threadIdx.x == 0) {
    *memory.average_factors = AverageFactors<T>(averages, *memory.weights, 1);
  }
  __syncthreads();
  Cursor<Capacity> cursor(table);
  visit_segments<T, T, kPacksAtATime / 2>(cursor, Order::backward, [&](const auto& at) {
    constexpr int W = kPackWidth<decltype(at)>;
    if (!cursor.moves()) return;
    AveragesAt<T, W> averages_at;
    IterateAt<T, W> iterate;
    T g[W], p[W], diagonal[W];
    averages_at.load(state, at);
    iterate.load(cursor, state, rates, 1, at);
    load_gradient(cursor, at, scale, g);
    averages_at.enter(state, *memory.average_factors, at, true, g, p, diagonal);
#pragma unroll
    for (int j = 0; j < W; ++j) p[j] *= diagonal[j];
    iterate.descend(cursor, state, at, p);
  });
}

template <class T, int Capacity>
ADAQN_PASS_KERNEL diagonal_descent_kernel(const __grid_constant__ Segments<Capacity> table,
                                          const __grid_constant__ State state, Scaling scaling,
                                          Averages averages,
                                          const __grid_constant__ TableRates rates) {
  StepMemory<T> memory(shared_memory(), state.slots);
  load_control(state, memory);
  load_projections(state, memory);
  weigh(averages, scaling.max_grad_norm, memory);
  diagonal_descent(table, state, scaling, averages, rates, memory);
}

template <class T, int Capacity>
ADAQN_PASS_KERNEL diagonal_step_kernel(const __grid_constant__ Segments<Capacity> table,
                                       const __grid_constant__ State state, Scaling scaling,
                                       Averages averages, const __grid_constant__ TableRates rates,
                                       Partials partials) {
  auto grid = cooperative_groups::this_grid();
  StepMemory<T> memory(shared_memory(), state.slots);
  load_control(state, memory);
  flags_pass(table, scaling, memory, partials);
  grid.sync();
  collect_projections(state, scaling, averages, memory, partials);
  diagonal_descent(table, state, scaling, averages, rates, memory);
  if (blockIdx.x == 0) {
    copy_words(state.projections, memory.projections, memory.slots + flag::count);
    finish_step(state, memory);
  }
}

// ------------------------------------------------------------------ launchers

/// Enqueues the step as one launch if one table holds all parameters and all blocks run at once.
template <class T>
cudaError_t try_fused(bool* done, const Parameters& list, const State& state,
                      const Scaling& scaling, const Averages* by_kind, const Rates& rates,
                      const Queue& queue) {
  if (!is_fusible(list, state)) return cudaSuccess;
  Partials partials{queue.workspace, 0, 0};
  auto enqueue = [&](const auto& table, const TableRange& range, const Shape& shape) {
    return launch_at_once(done, diagonal_step_kernel<T, kCapacity<decltype(table)>>, shape,
                          queue.stream, table, state, scaling, by_kind[range.kind],
                          rates_of(rates, range, list), partials);
  };
  return for_each_step_launch<T, T>(list, state, partials, enqueue);
}

template <class T>
cudaError_t descend(const Parameters& list, const State& state, const Scaling& scaling,
                    const Averages* by_kind, const Rates& rates, const Queue& queue) {
  Partials unused{};
  auto enqueue = [&](const auto& table, const TableRange& range, const Shape& shape) {
    return launch(diagonal_descent_kernel<T, kCapacity<decltype(table)>>, shape, queue.stream,
                  table, state, scaling, by_kind[range.kind], rates_of(rates, range, list));
  };
  return for_each_step_launch<T, T>(list, state, unused, enqueue);
}

}  // namespace

cudaError_t diagonal_step(const Parameters& list, const State& state, const Scaling& scaling,
                          const Averages* by_kind, const Rates& rates, const Queue& queue) {
  return with_types(state.type, state.type, [&](auto types) {
    using T = typename decltype(types)::T;
    bool done = false;
    ADAQN_CUDA_TRY(try_fused<T>(&done, list, state, scaling, by_kind, rates, queue));
    if (done) return cudaSuccess;
    ADAQN_CUDA_TRY(direction_pass1(list, state, scaling, 0, queue));
    ADAQN_CUDA_TRY(descend<T>(list, state, scaling, by_kind, rates, queue));
    return enqueue_finish(state, 0, queue);
  });
}

cudaError_t load_diagonal(const Kinds& kinds) {
  return with_types(kinds.vectors, kinds.vectors, [&](auto types) {
    using T = typename decltype(types)::T;
    return for_capacities<kSmallTable, kLargeTable>([](auto capacity) {
      constexpr int C = decltype(capacity)::value;
      return load(diagonal_step_kernel<T, C>, diagonal_descent_kernel<T, C>);
    });
  });
}

}  // namespace adaqn::cuda
