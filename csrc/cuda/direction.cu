// One step: the direction in three passes, its recursions in between, and the update.
//
// Passes run as kernels of their own, or as parts of one cooperative kernel with a grid barrier
// after each of the first two; both call the same functions.  Order of traversal: pass 1 forward,
// passes 2 and 3 backward, so that g and S are first read where the cache still holds them, and the
// next step's pass 1 begins where this one's pass 3 ended.  Y, read once per step, is streamed.
#include <cooperative_groups.h>

#include <cmath>

#include "control.cuh"
#include "launch.cuh"

namespace adaqn::cuda {
namespace {

/// Up to this many elements a step is one cooperative launch; above, six launches weigh nothing.
constexpr int64_t kFusedElements = int64_t(1) << 24;

/// Rates of the groups of one table, by value, or where to find them.
struct TableRates {
  double lr[kTableGroups], weight_decay[kTableGroups];
  const double *lr_tensor, *weight_decay_tensor;  // at the table's first group; null: by value

  __device__ __forceinline__ double lr_of(int group) const {
    return lr_tensor ? lr_tensor[group] : lr[group];
  }
  __device__ __forceinline__ double weight_decay_of(int group) const {
    return weight_decay_tensor ? weight_decay_tensor[group] : weight_decay[group];
  }
};

// ------------------------------------------------------------------ what the passes share

/// The gradient to descend.
template <class T, int W, int Capacity>
__device__ __forceinline__ void load_gradient(const Cursor<Capacity>& cursor, const Pack<W>& at,
                                              T scale, T (&g)[W]) {
  load_grad(cursor, at, g);
#pragma unroll
  for (int j = 0; j < W; ++j) {
    g[j] *= scale;
  }
}

/// What turns a gradient as given into the one to descend.
template <class T>
__device__ __forceinline__ T scale_of(const Scaling& scaling) {
  const double scale = scaling.grad_scale ? 1 / double(*scaling.grad_scale) : 1.0;
  return T(scaling.maximize ? -scale : scale);
}

template <class T>
__device__ void load_control(const State& state, const StepMemory<T>& memory) {
  copy_words(memory.counters, state.counters, counter::count);
  __syncthreads();
}

template <class T>
__device__ void load_projections(const State& state, const StepMemory<T>& memory) {
  copy_words(memory.projections, state.projections, memory.slots + flag::count);
  __syncthreads();
}

// ------------------------------------------------------------------ pass 1

/// Partial sums: a row per flag, then u_i = s_i.g per stored pair.
template <class T, class H, int Capacity>
__device__ void pass1(const Segments<Capacity>& table, const State& state, const Scaling& scaling,
                      const StepMemory<T>& memory, const Partials& partials) {
  const Rows<H> s = stored_rows<H>(state.s_ring, memory.ring());
  const T scale = scale_of<T>(scaling);
  Cursor<Capacity> cursor(table);
  Sums<T> sums(memory.sums, flag::count + s.count);
  unsigned nonfinite = 0, nonzero = 0;
  visit_segments<T, H>(cursor, Order::forward, [&](const auto& at) {
    constexpr int W = kPackWidth<decltype(at)>;
    T g[W];
    load_gradient(cursor, at, scale, g);
#pragma unroll
    for (int j = 0; j < W; ++j) {
      nonfinite += !is_finite(g[j]);
      nonzero += g[j] != 0;
    }
    add_products<Cache::keep>(s, at, g, sums, flag::count);
  });
  sums[flag::nonfinite] = T(nonfinite);
  sums[flag::nonzero] = T(nonzero);
  store_partials(memory.sums, flag::count + s.count, 0, partials);
}

/// projections, from the partial sums of pass 1.
template <class T>
__device__ void collect_projections(const Scaling& scaling, const StepMemory<T>& memory,
                                    const Partials& partials) {
  const PairRing ring = memory.ring();
  sum_partials<T>(partials, flag::count + ring.pairs, memory.totals);
  double* flags = memory.projections + memory.slots;
  for (int age = threadIdx.x; age < memory.slots; age += blockDim.x) {
    memory.projections[ring.slot(age)] = age < ring.pairs ? memory.totals[flag::count + age] : 0.0;
  }
  if (threadIdx.x == 0) {
    flags[flag::nonzero] = memory.totals[flag::nonzero];
    flags[flag::nonfinite] = memory.totals[flag::nonfinite];
    if (scaling.found_inf) flags[flag::nonfinite] += *scaling.found_inf;
  }
  __syncthreads();
}

// ------------------------------------------------------------------ pass 2

/// q = g - sum_i a_i y_i;  v = keep v + add g^2;  r = D q;  g enters the Fisher ring.  Partial
/// sums: z_i = y_i.r per stored pair.  Writes nothing unless the step is accepted.
template <class T, class H, int Capacity>
__device__ void pass2(const Segments<Capacity>& table, const State& state, const Scaling& scaling,
                      const Diagonal& diagonal, const StepMemory<T>& memory,
                      const Partials& partials) {
  if (!memory.accepted()) return;
  const Rows<H> y = stored_rows<H>(state.y_ring, memory.ring());
  const T scale = scale_of<T>(scaling);
  const T keep = T(diagonal.keep), add = T(diagonal.add), eps = T(diagonal.eps);
  T* accumulator = static_cast<T*>(state.accumulator);
  T* direction = static_cast<T*>(state.direction);
  const int64_t fisher_row = memory.counters[counter::next_gradient] * state.fisher.stride;
  const T gamma = accumulator ? T(1) : T(scalar_initial_matrix(state.gram, memory.ring()));
  for (int i = threadIdx.x; i < memory.slots; i += blockDim.x) memory.factors[i] = -T(memory.a[i]);
  __syncthreads();

  Cursor<Capacity> cursor(table);
  Sums<T> sums(memory.sums, y.count);
  visit_segments<T, H>(cursor, Order::backward, [&](const auto& at) {
    constexpr int W = kPackWidth<decltype(at)>;
    T g[W], r[W];
    load_gradient(cursor, at, scale, g);
    with_type(state.fisher_type, [&](auto tag) {
      store(static_cast<decltype(tag)*>(state.fisher.data) + fisher_row, at, g);
    });
#pragma unroll
    for (int j = 0; j < W; ++j) r[j] = g[j];
    add_combination<Cache::keep>(y, memory.factors, at, r);
    if (accumulator) {
      T v[W];
      load(accumulator, at, v);
#pragma unroll
      for (int j = 0; j < W; ++j) {
        v[j] = keep * v[j] + add * g[j] * g[j];
        r[j] *= rsqrt(v[j] + eps);
      }
      store(accumulator, at, v);
    } else {
#pragma unroll
      for (int j = 0; j < W; ++j) r[j] *= gamma;
    }
    store(direction, at, r);
    add_products<Cache::stream>(y, at, r, sums, 0);
  });
  store_partials(memory.sums, y.count, 0, partials);
}

/// images, from the partial sums of pass 2.
template <class T>
__device__ void collect_images(const StepMemory<T>& memory, const Partials& partials) {
  const PairRing ring = memory.ring();
  sum_partials<T>(partials, ring.pairs, memory.totals);
  for (int age = threadIdx.x; age < memory.slots; age += blockDim.x) {
    memory.images[ring.slot(age)] = age < ring.pairs ? memory.totals[age] : 0.0;
  }
  __syncthreads();
}

// ------------------------------------------------------------------ pass 3

/// w_sum += w;  w = (1 - lr weight_decay) w - lr (r + sum_i c_i s_i), if the step is accepted.
template <class T, class H, int Capacity>
__device__ void pass3(const Segments<Capacity>& table, const State& state, const TableRates& rates,
                      const StepMemory<T>& memory) {
  if (!memory.accepted()) return;
  const Rows<H> s = stored_rows<H>(state.s_ring, memory.ring());
  T* iterate_sum = static_cast<T*>(state.iterate_sum);
  const T* direction = static_cast<const T*>(state.direction);
  for (int i = threadIdx.x; i < memory.slots; i += blockDim.x) memory.factors[i] = T(memory.c[i]);
  __syncthreads();

  Cursor<Capacity> cursor(table);
  visit_segments<T, H>(cursor, Order::backward, [&](const auto& at) {
    constexpr int W = kPackWidth<decltype(at)>;
    T p[W], w[W], sum[W];
    load(direction, at, p);
    load_param(cursor, at, w);
    load(iterate_sum, at, sum);
    const int group = table.group[cursor.segment];
    const double lr = rates.lr_of(group);
    const T rate = T(lr), shrink = T(1 - lr * rates.weight_decay_of(group));
    add_combination<Cache::keep>(s, memory.factors, at, p);
#pragma unroll
    for (int j = 0; j < W; ++j) {
      sum[j] += w[j];
      w[j] = shrink * w[j] - rate * p[j];
    }
    store(iterate_sum, at, sum);
    store_param(cursor, at, w);
  });
}

// ------------------------------------------------------------------ kernels

#define ADAQN_STEP_KERNEL __global__ void __launch_bounds__(kThreads<T>, kBlocksPerMultiprocessor)

template <class T, class H, int Capacity>
ADAQN_STEP_KERNEL pass1_kernel(const __grid_constant__ Segments<Capacity> table,
                               const __grid_constant__ State state, Scaling scaling,
                               Partials partials) {
  StepMemory<T> memory(shared_memory(), state.slots);
  load_control(state, memory);
  pass1<T, H>(table, state, scaling, memory, partials);
}

template <class T>
ADAQN_STEP_KERNEL finish_pass1_kernel(const __grid_constant__ State state, Scaling scaling,
                                      Partials partials) {
  StepMemory<T> memory(shared_memory(), state.slots);
  load_control(state, memory);
  collect_projections(scaling, memory, partials);
  copy_words(state.projections, memory.projections, memory.slots + flag::count);
}

template <class T, class H, int Capacity>
ADAQN_STEP_KERNEL pass2_kernel(const __grid_constant__ Segments<Capacity> table,
                               const __grid_constant__ State state, Scaling scaling,
                               Diagonal diagonal, Partials partials) {
  StepMemory<T> memory(shared_memory(), state.slots);
  load_control(state, memory);
  load_projections(state, memory);
  solve_backward(state, memory);
  pass2<T, H>(table, state, scaling, diagonal, memory, partials);
}

template <class T>
ADAQN_STEP_KERNEL finish_pass2_kernel(const __grid_constant__ State state, Partials partials) {
  StepMemory<T> memory(shared_memory(), state.slots);
  load_control(state, memory);
  load_projections(state, memory);
  if (!memory.accepted()) return;
  collect_images(memory, partials);
  copy_words(state.images, memory.images, memory.slots);
}

template <class T, class H, int Capacity>
ADAQN_STEP_KERNEL pass3_kernel(const __grid_constant__ Segments<Capacity> table,
                               const __grid_constant__ State state,
                               const __grid_constant__ TableRates rates) {
  StepMemory<T> memory(shared_memory(), state.slots);
  load_control(state, memory);
  load_projections(state, memory);
  copy_words(memory.images, state.images, memory.slots);
  solve_backward(state, memory);
  solve_forward(state, memory);
  pass3<T, H>(table, state, rates, memory);
}

__global__ void finish_pass3_kernel(const __grid_constant__ State state) {
  const double* flags = state.projections + state.slots;
  count_step(state.counters, flags, step_is_accepted(flags, state.counters), state.fisher_size);
}

template <class T, class H, int Capacity>
ADAQN_STEP_KERNEL step_kernel(const __grid_constant__ Segments<Capacity> table,
                              const __grid_constant__ State state, Scaling scaling,
                              Diagonal diagonal, const __grid_constant__ TableRates rates,
                              Partials partials1, Partials partials2) {
  auto grid = cooperative_groups::this_grid();
  StepMemory<T> memory(shared_memory(), state.slots);
  load_control(state, memory);
  pass1<T, H>(table, state, scaling, memory, partials1);
  grid.sync();
  collect_projections(scaling, memory, partials1);
  solve_backward(state, memory);
  pass2<T, H>(table, state, scaling, diagonal, memory, partials2);
  grid.sync();
  if (memory.accepted()) {
    collect_images(memory, partials2);
    solve_forward(state, memory);
    pass3<T, H>(table, state, rates, memory);
  }
  if (blockIdx.x == 0) {
    copy_words(state.projections, memory.projections, memory.slots + flag::count);
    if (threadIdx.x == 0) {
      count_step(state.counters, memory.flags(), memory.accepted(), state.fisher_size);
    }
  }
}

#undef ADAQN_STEP_KERNEL

// ------------------------------------------------------------------ launchers

TableRates rates_of(const Rates& rates, const TableRange& range, const Parameters& list) {
  const int32_t groups = list.tensors[range.next_tensor - 1].group - range.first_group + 1;
  TableRates result{};
  if (rates.lr_tensor) result.lr_tensor = rates.lr_tensor + range.first_group;
  if (rates.weight_decay_tensor) {
    result.weight_decay_tensor = rates.weight_decay_tensor + range.first_group;
  }
  for (int32_t k = 0; k < groups && k < kTableGroups; ++k) {
    if (!rates.lr_tensor) result.lr[k] = rates.lr[range.first_group + k];
    if (!rates.weight_decay_tensor) {
      result.weight_decay[k] = rates.weight_decay[range.first_group + k];
    }
  }
  return result;
}

template <class T>
size_t step_shared_bytes(const State& state) {
  return StepMemory<T>(nullptr, state.slots).bytes;
}

template <class T>
Shape one_block(const State& state) {
  return {dim3(1), kThreads<T>, step_shared_bytes<T>(state)};
}

/// Calls enqueue(table, range, shape) for every table.
template <class Types, class Enqueue>
cudaError_t for_each_step_launch(const Parameters& list, const State& state, Partials& partials,
                                 Enqueue enqueue) {
  using T = typename Types::T;
  return for_each_launch<T, kWidth<typename Types::H>>(list, state, step_shared_bytes<T>(state),
                                                       partials, enqueue);
}

/// Enqueues the step as one launch if one table holds all parameters and all blocks run at once.
template <class Types>
cudaError_t try_fused(bool* done, const Parameters& list, const State& state,
                      const Scaling& scaling, const Diagonal& diagonal, const Rates& rates,
                      const Queue& queue) {
  const bool one_table = next_range(list, {}).next_tensor == list.count;
  if (!one_table || state.numel == 0 || state.numel > kFusedElements) return cudaSuccess;
  Partials partials1{queue.workspace, 0, 0};
  auto enqueue = [&](const auto& table, const TableRange& range, Shape shape) {
    auto* kernel = step_kernel<typename Types::T, typename Types::H, kCapacity<decltype(table)>>;
    ADAQN_CUDA_TRY(runs_at_once(done, kernel, shape));
    if (!*done) return cudaSuccess;
    shape.cooperative = true;
    Partials partials2 = partials1;
    partials2.data += (state.slots + flag::count) * partials1.columns;
    return launch(kernel, shape, queue.stream, table, state, scaling, diagonal,
                  rates_of(rates, range, list), partials1, partials2);
  };
  return for_each_step_launch<Types>(list, state, partials1, enqueue);
}

}  // namespace

size_t workspace_bytes(const Parameters& list, const State& state) {
  int limit = 0;
  if (max_blocks(&limit) != cudaSuccess) return 0;
  // The fused step keeps the sums of passes 1 and 2 at a time; narrow packs make the most blocks.
  const int64_t rows = std::max<int64_t>(2 * state.slots + flag::count, state.fisher_size);
  const int64_t tables = total_blocks<double, 1>(list, limit);
  return size_t(rows * std::max<int64_t>(tables, limit)) * sizeof(double);
}

cudaError_t direction_pass1(const Parameters& list, const State& state, const Scaling& scaling,
                            const Queue& queue) {
  return with_types(state.type, state.pair_type, [&](auto types) {
    using Types = decltype(types);
    using T = typename Types::T;
    Partials partials{queue.workspace, 0, 0};
    auto enqueue = [&](const auto& table, const TableRange&, const Shape& shape) {
      return launch(pass1_kernel<T, typename Types::H, kCapacity<decltype(table)>>, shape,
                    queue.stream, table, state, scaling, partials);
    };
    ADAQN_CUDA_TRY(for_each_step_launch<Types>(list, state, partials, enqueue));
    return launch(finish_pass1_kernel<T>, one_block<T>(state), queue.stream, state, scaling,
                  partials);
  });
}

cudaError_t direction_pass2(const Parameters& list, const State& state, const Scaling& scaling,
                            const Diagonal& diagonal, const Queue& queue) {
  return with_types(state.type, state.pair_type, [&](auto types) {
    using Types = decltype(types);
    using T = typename Types::T;
    Partials partials{queue.workspace, 0, 0};
    auto enqueue = [&](const auto& table, const TableRange&, const Shape& shape) {
      return launch(pass2_kernel<T, typename Types::H, kCapacity<decltype(table)>>, shape,
                    queue.stream, table, state, scaling, diagonal, partials);
    };
    ADAQN_CUDA_TRY(for_each_step_launch<Types>(list, state, partials, enqueue));
    return launch(finish_pass2_kernel<T>, one_block<T>(state), queue.stream, state, partials);
  });
}

cudaError_t direction_pass3(const Parameters& list, const State& state, const Rates& rates,
                            const Queue& queue) {
  return with_types(state.type, state.pair_type, [&](auto types) {
    using Types = decltype(types);
    using T = typename Types::T;
    Partials unused{};
    auto enqueue = [&](const auto& table, const TableRange& range, const Shape& shape) {
      return launch(pass3_kernel<T, typename Types::H, kCapacity<decltype(table)>>, shape,
                    queue.stream, table, state, rates_of(rates, range, list));
    };
    ADAQN_CUDA_TRY(for_each_step_launch<Types>(list, state, unused, enqueue));
    return launch(finish_pass3_kernel, Shape{dim3(1), 1, 0}, queue.stream, state);
  });
}

cudaError_t direction_step(const Parameters& list, const State& state, const Scaling& scaling,
                           const Diagonal& diagonal, const Rates& rates, const Queue& queue) {
  bool done = false;
  ADAQN_CUDA_TRY(with_types(state.type, state.pair_type, [&](auto types) {
    return try_fused<decltype(types)>(&done, list, state, scaling, diagonal, rates, queue);
  }));
  if (done) return cudaSuccess;
  ADAQN_CUDA_TRY(direction_pass1(list, state, scaling, queue));
  ADAQN_CUDA_TRY(direction_pass2(list, state, scaling, diagonal, queue));
  return direction_pass3(list, state, rates, queue);
}

}  // namespace adaqn::cuda
