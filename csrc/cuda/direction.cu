// One step: the direction in three passes, its recursions in between, and the update.
//
// Passes run as kernels of their own, or as parts of one cooperative kernel with a grid barrier
// after each of the first two; both call the same functions.  A cap on the direction splits the
// third: |p| must be known before the parameters move.  Order of traversal: pass 1 forward, passes
// 2 and 3 backward, so that g and S are first read where the cache still holds them, and the next
// step's pass 1 begins where this one's pass 3 ended.  Y, read once per step, is streamed.
#include <cooperative_groups.h>

#include "averages.cuh"
#include "control.cuh"
#include "descent.cuh"
#include "launch.cuh"
#include "load.cuh"
#include "products.cuh"
#include "step.cuh"

namespace adaqn::cuda {
namespace {

// ------------------------------------------------------------------ pass 2

/// g enters v, m and the ring of gradients;  r = D (q - sum_i a_i y_i).  Partial sums: z_i = y_i.r
/// per stored pair, then |D q|^2; none with `identity`.  Writes nothing unless the step is
/// accepted.
template <class T, class H, int Capacity>
__device__ void pass2(const Segments<Capacity>& table, const State& state, const Scaling& scaling,
                      const Averages& averages, bool identity, const StepMemory<T>& memory,
                      const Partials& partials) {
  if (!memory.accepted()) return;
  const Rows<H> y = stored_rows<H>(state.y_ring, memory.ring());
  const T scale = T(scale_of(scaling) * memory.weights->clip);
  T* direction = static_cast<T*>(state.direction);
  const int64_t fisher_row = memory.counters[counter::next_gradient] * state.fisher.stride;
  for (int i = threadIdx.x; i < y.count; i += blockDim.x) {
    memory.factors[i] = -T(memory.coefficients[i]);
  }
  if (threadIdx.x == 0) {
    const bool scalar = !identity && !state.accumulator;
    const double gamma = scalar ? scalar_initial_matrix(state.gram, memory.ring()) : 1.0;
    *memory.average_factors = AverageFactors<T>(averages, *memory.weights, gamma);
  }
  __syncthreads();

  Cursor<Capacity> cursor(table);
  Sums<T> sums(memory.sums, y.count);
  memory.squares[threadIdx.x] = 0;
  visit_segments<T, H>(cursor, Order::backward, [&](const auto& at) {
    constexpr int W = kPackWidth<decltype(at)>;
    AveragesAt<T, W> averages_at;
    T g[W], r[W], diagonal[W];
    averages_at.load(state, at);
    load_gradient(cursor, at, scale, g);
    if (state.fisher.data) {
      with_type(state.fisher_type, [&](auto tag) {
        store(static_cast<decltype(tag)*>(state.fisher.data) + fisher_row, at, g);
      });
    }
    averages_at.enter(state, *memory.average_factors, at, cursor.moves(), g, r, diagonal);
    double square = 0;
#pragma unroll
    for (int j = 0; j < W; ++j) {
      const double scaled = diagonal[j] * r[j];
      square += scaled * scaled;
    }
    memory.squares[threadIdx.x] += square;
    add_combination<Cache::keep>(y, memory.factors, at, r);
#pragma unroll
    for (int j = 0; j < W; ++j) r[j] *= diagonal[j];
    store(direction, at, r);
    if (!identity) add_products<Cache::stream>(y, at, r, sums, 0);
  });
  if (!identity) store_with_squares(memory, y.count, partials);
}

/// images, from the partial sums of pass 2.
template <class T>
__device__ void collect_images(const StepMemory<T>& memory, const Partials& partials) {
  const PairRing ring = memory.ring();
  sum_partials<T>(partials, ring.pairs + 1, memory.totals);
  for (int age = threadIdx.x; age < memory.slots; age += blockDim.x) {
    memory.images[ring.slot(age)] = age < ring.pairs ? finite_or_zero(memory.totals[age]) : 0.0;
  }
  if (threadIdx.x == 0) memory.images[memory.slots] = memory.totals[ring.pairs];
  __syncthreads();
}

// ------------------------------------------------------------------ pass 3

/// The descent along p = r + sum_i c_i s_i, if the step is accepted.  With a cap, p goes to
/// `direction` instead, and the partial sum is |p|^2.
template <class T, class H, int Capacity>
__device__ void pass3(const Segments<Capacity>& table, const State& state, const TableRates& rates,
                      bool capped, const StepMemory<T>& memory, const Partials& partials) {
  if (!memory.accepted()) return;
  const Rows<H> s = stored_rows<H>(state.s_ring, memory.ring());
  T* direction = static_cast<T*>(state.direction);
  for (int i = threadIdx.x; i < s.count; i += blockDim.x) {
    memory.factors[i] = T(memory.coefficients[i]);
  }
  __syncthreads();

  Cursor<Capacity> cursor(table);
  double square = 0;
  visit_segments<T, H>(cursor, Order::backward, [&](const auto& at) {
    constexpr int W = kPackWidth<decltype(at)>;
    const bool moves = cursor.moves();
    if (capped && !moves) return;
    IterateAt<T, W> iterate;
    T p[W];
    load(direction, at, p);
    if (!capped) iterate.load(cursor, state, rates, 1, at);
    if (moves) add_combination<Cache::keep>(s, memory.factors, at, p);
    if (capped) {
      store(direction, at, p);
#pragma unroll
      for (int j = 0; j < W; ++j) square += double(p[j]) * double(p[j]);
    } else {
      iterate.descend(cursor, state, at, p);
    }
  });
  if (!capped) return;
  memory.squares[threadIdx.x] = square;
  store_partials<T>(memory.squares, 1, partials);
}

/// The descent along p as pass 3 left it, shortened to max_direction |H0 q|.
template <class T, int Capacity>
__device__ void capped_descent(const Segments<Capacity>& table, const State& state,
                               const TableRates& rates, double max_direction,
                               const StepMemory<T>& memory, const Partials& partials) {
  if (!memory.accepted()) return;
  sum_partials<T>(partials, 1, memory.totals);
  if (threadIdx.x == 0) {
    const double size = sqrt(memory.totals[0]);
    const double limit = max_direction * sqrt(memory.images[memory.slots]);
    memory.weights->cap = size > limit ? limit / size : 1.0;
  }
  __syncthreads();
  const double cap = memory.weights->cap;
  const T* direction = static_cast<const T*>(state.direction);
  Cursor<Capacity> cursor(table);
  visit_segments<T, T>(cursor, Order::forward, [&](const auto& at) {
    constexpr int W = kPackWidth<decltype(at)>;
    IterateAt<T, W> iterate;
    T p[W];
    load(direction, at, p);
    iterate.load(cursor, state, rates, cap, at);
    iterate.descend(cursor, state, at, p);
  });
}

// ------------------------------------------------------------------ kernels

template <class T, class H, int Capacity>
ADAQN_PASS_KERNEL pass1_kernel(const __grid_constant__ Segments<Capacity> table,
                               const __grid_constant__ State state, Scaling scaling,
                               Partials partials) {
  StepMemory<T> memory(shared_memory(), state.slots);
  load_control(state, memory);
  pass1<T, H>(table, state, scaling, memory, partials);
}

template <class T, int Capacity>
ADAQN_PASS_KERNEL flags_pass_kernel(const __grid_constant__ Segments<Capacity> table,
                                    const __grid_constant__ State state, Scaling scaling,
                                    Partials partials) {
  StepMemory<T> memory(shared_memory(), state.slots);
  flags_pass(table, scaling, memory, partials);
}

template <class T>
ADAQN_PASS_KERNEL finish_pass1_kernel(const __grid_constant__ State state, Scaling scaling,
                                      Averages averages, Partials partials) {
  StepMemory<T> memory(shared_memory(), state.slots);
  load_control(state, memory);
  collect_projections(state, scaling, averages, memory, partials);
  copy_words(state.projections, memory.projections, memory.slots + flag::count);
}

template <class T, class H, int Capacity>
ADAQN_PASS_KERNEL pass2_kernel(const __grid_constant__ Segments<Capacity> table,
                               const __grid_constant__ State state, Scaling scaling,
                               Averages averages, bool identity, Partials partials) {
  StepMemory<T> memory(shared_memory(), state.slots);
  load_control(state, memory);
  load_projections(state, memory);
  weigh(averages, scaling.max_grad_norm, memory);
  load_triangle(state, memory);
  solve_backward(memory);
  pass2<T, H>(table, state, scaling, averages, identity, memory, partials);
}

template <class T>
ADAQN_PASS_KERNEL finish_images_kernel(const __grid_constant__ State state, Partials partials) {
  StepMemory<T> memory(shared_memory(), state.slots);
  load_control(state, memory);
  load_projections(state, memory);
  if (!memory.accepted()) return;
  collect_images(memory, partials);
  copy_words(state.images, memory.images, memory.slots + 1);
}

template <class T, class H, int Capacity>
ADAQN_PASS_KERNEL pass3_kernel(const __grid_constant__ Segments<Capacity> table,
                               const __grid_constant__ State state,
                               const __grid_constant__ TableRates rates, bool capped,
                               Partials partials) {
  StepMemory<T> memory(shared_memory(), state.slots);
  load_control(state, memory);
  load_projections(state, memory);
  copy_words(memory.images, state.images, memory.slots);
  load_triangle(state, memory);
  solve_backward(memory);
  solve_forward(memory);
  pass3<T, H>(table, state, rates, capped, memory, partials);
}

template <class T, int Capacity>
ADAQN_PASS_KERNEL capped_descent_kernel(const __grid_constant__ Segments<Capacity> table,
                                        const __grid_constant__ State state,
                                        const __grid_constant__ TableRates rates,
                                        double max_direction, Partials partials) {
  StepMemory<T> memory(shared_memory(), state.slots);
  load_control(state, memory);
  copy_words(memory.images, state.images, memory.slots + 1);
  load_projections(state, memory);
  capped_descent(table, state, rates, max_direction, memory, partials);
}

template <class T>
ADAQN_PASS_KERNEL finish_step_kernel(const __grid_constant__ State state, Averages averages) {
  StepMemory<T> memory(shared_memory(), state.slots);
  load_control(state, memory);
  load_projections(state, memory);
  weigh(averages, INFINITY, memory);
  finish_step(state, memory);
}

template <class T, class H, int Capacity>
ADAQN_PASS_KERNEL step_kernel(const __grid_constant__ Segments<Capacity> table,
                              const __grid_constant__ State state, Scaling scaling,
                              Averages averages, double max_direction,
                              const __grid_constant__ TableRates rates, Partials partials1,
                              Partials partials2) {
  auto grid = cooperative_groups::this_grid();
  const bool capped = is_finite(max_direction);
  StepMemory<T> memory(shared_memory(), state.slots);
  load_control(state, memory);
  pass1<T, H>(table, state, scaling, memory, partials1);
  grid.sync();
  collect_projections(state, scaling, averages, memory, partials1);
  load_triangle(state, memory);
  solve_backward(memory);
  pass2<T, H>(table, state, scaling, averages, false, memory, partials2);
  grid.sync();
  if (memory.accepted()) {
    collect_images(memory, partials2);
    load_triangle(state, memory);
    solve_forward(memory);
    pass3<T, H>(table, state, rates, capped, memory, partials1);  // whose sums have been read
  }
  if (capped) {
    grid.sync();
    capped_descent(table, state, rates, max_direction, memory, partials1);
  }
  if (blockIdx.x == 0) {
    copy_words(state.projections, memory.projections, memory.slots + flag::count);
    finish_step(state, memory);
  }
}

// ------------------------------------------------------------------ launchers

/// For kernels that only need the look-ahead.
Averages of_gradients(double beta) { return {beta, 1, 0, 0, false}; }

/// Enqueues the step as one launch if one table holds all parameters and all blocks run at once.
template <class T, class H>
cudaError_t try_fused(bool* done, const Parameters& list, const State& state,
                      const Scaling& scaling, const Averages& averages, double max_direction,
                      const Rates& rates, const Queue& queue) {
  if (!is_fusible(list, state)) return cudaSuccess;
  Partials partials{queue.workspace, 0, 0};
  auto enqueue = [&](const auto& table, const TableRange& range, const Shape& shape) {
    return launch_at_once(done, step_kernel<T, H, kCapacity<decltype(table)>>, shape, queue.stream,
                          table, state, scaling, averages, max_direction,
                          rates_of(rates, range, list), partials,
                          partials.from(state.slots + flag::count));
  };
  return for_each_step_launch<T, H>(list, state, partials, enqueue);
}

template <class T, class H>
cudaError_t pass3(const Parameters& list, const State& state, double max_direction,
                  const Rates& rates, const Queue& queue) {
  const bool capped = is_finite(max_direction);
  Partials partials{queue.workspace, 0, 0};
  auto enqueue = [&](const auto& table, const TableRange& range, const Shape& shape) {
    return launch(pass3_kernel<T, H, kCapacity<decltype(table)>>, shape, queue.stream, table, state,
                  rates_of(rates, range, list), capped, partials);
  };
  ADAQN_CUDA_TRY((for_each_step_launch<T, H>(list, state, partials, enqueue)));
  if (!capped) return cudaSuccess;
  auto descend = [&](const auto& table, const TableRange& range, const Shape& shape) {
    return launch(capped_descent_kernel<T, kCapacity<decltype(table)>>, shape, queue.stream, table,
                  state, rates_of(rates, range, list), max_direction, partials);
  };
  Partials unused{};
  return for_each_step_launch<T, T>(list, state, unused, descend);
}

}  // namespace

size_t workspace_bytes(const Parameters& list, const State& state) {
  int limit = 0;
  if (max_blocks(&limit) != cudaSuccess) return 0;
  // The fused step keeps the sums of passes 1 and 2 at a time; narrow packs make the most blocks.
  const int64_t of_passes = (state.slots + flag::count) + (state.slots + 1);
  const int64_t rows = std::max<int64_t>(of_passes, state.fisher_size + 1);
  const int64_t tables = total_blocks<double, 1>(list, limit);
  const int64_t words = rows * std::max<int64_t>(tables, limit);
  return size_t(std::max(words, product_words(state.slots, limit))) * sizeof(double);
}

cudaError_t direction_pass1(const Parameters& list, const State& state, const Scaling& scaling,
                            double beta, const Queue& queue) {
  return with_types(state.type, state.pair_type, [&](auto types) {
    using T = typename decltype(types)::T;
    using H = typename decltype(types)::H;
    Partials partials{queue.workspace, 0, 0};
    auto enqueue = [&](const auto& table, const TableRange&, const Shape& shape) {
      constexpr int C = kCapacity<decltype(table)>;
      const auto kernel = state.slots > 0 ? pass1_kernel<T, H, C> : flags_pass_kernel<T, C>;
      return launch(kernel, shape, queue.stream, table, state, scaling, partials);
    };
    ADAQN_CUDA_TRY((for_each_step_launch<T, H>(list, state, partials, enqueue)));
    return launch(finish_pass1_kernel<T>, one_block<T>(state), queue.stream, state, scaling,
                  of_gradients(beta), partials);
  });
}

cudaError_t direction_pass2(const Parameters& list, const State& state, const Scaling& scaling,
                            const Averages* by_kind, bool identity, const Queue& queue) {
  return with_types(state.type, state.pair_type, [&](auto types) {
    using T = typename decltype(types)::T;
    using H = typename decltype(types)::H;
    Partials partials{queue.workspace, 0, 0};
    auto enqueue = [&](const auto& table, const TableRange& range, const Shape& shape) {
      return launch(pass2_kernel<T, H, kCapacity<decltype(table)>>, shape, queue.stream, table,
                    state, scaling, by_kind[range.kind], identity, partials);
    };
    ADAQN_CUDA_TRY((for_each_step_launch<T, H>(list, state, partials, enqueue)));
    if (identity) return cudaSuccess;
    return launch(finish_images_kernel<T>, one_block<T>(state), queue.stream, state, partials);
  });
}

cudaError_t direction_pass3(const Parameters& list, const State& state, double beta,
                            double max_direction, const Rates& rates, const Queue& queue) {
  ADAQN_CUDA_TRY(with_types(state.type, state.pair_type, [&](auto types) {
    using Types = decltype(types);
    return pass3<typename Types::T, typename Types::H>(list, state, max_direction, rates, queue);
  }));
  return enqueue_finish(state, beta, queue);
}

cudaError_t enqueue_finish(const State& state, double beta, const Queue& queue) {
  return with_types(state.type, state.type, [&](auto types) {
    using T = typename decltype(types)::T;
    return launch(finish_step_kernel<T>, one_block<T>(state), queue.stream, state,
                  of_gradients(beta));
  });
}

cudaError_t direction_step(const Parameters& list, const State& state, const Scaling& scaling,
                           const Averages& averages, double max_direction, const Rates& rates,
                           const Queue& queue) {
  bool done = false;
  ADAQN_CUDA_TRY(with_types(state.type, state.pair_type, [&](auto types) {
    using Types = decltype(types);
    return try_fused<typename Types::T, typename Types::H>(&done, list, state, scaling, averages,
                                                           max_direction, rates, queue);
  }));
  if (done) return cudaSuccess;
  ADAQN_CUDA_TRY(direction_pass1(list, state, scaling, averages.beta, queue));
  ADAQN_CUDA_TRY(direction_pass2(list, state, scaling, &averages, false, queue));
  return direction_pass3(list, state, averages.beta, max_direction, rates, queue);
}

cudaError_t load_direction(const Kinds& kinds) {
  return with_types(kinds.vectors, kinds.pairs, [&](auto types) {
    using T = typename decltype(types)::T;
    using H = typename decltype(types)::H;
    ADAQN_CUDA_TRY(load(finish_pass1_kernel<T>, finish_images_kernel<T>, finish_step_kernel<T>));
    return for_capacities<kSmallTable, kLargeTable>([](auto capacity) {
      constexpr int C = decltype(capacity)::value;
      return load(pass1_kernel<T, H, C>, pass2_kernel<T, H, C>, pass3_kernel<T, H, C>,
                  step_kernel<T, H, C>, capped_descent_kernel<T, C>, flags_pass_kernel<T, C>);
    });
  });
}

}  // namespace adaqn::cuda
