// What the steps with and without pairs share: pass 1, and what every step ends with.
#pragma once

#include "averages.cuh"
#include "control.cuh"
#include "launch.cuh"
#include "segments.cuh"

namespace adaqn::cuda {

/// Partial sums: `count` of the sums, then the squares.
template <class T>
__device__ void store_with_squares(const StepMemory<T>& memory, int count,
                                   const Partials& partials) {
  store_partials<T>(memory.sums, count, partials);
  store_partials<T>(memory.squares, 1, partials.from(count));
}

/// What a thread has found out about the gradient alone.
template <class T>
class GradientSums {
 public:
  template <int W>
  __device__ __forceinline__ void add(const T (&g)[W]) {
#pragma unroll
    for (int j = 0; j < W; ++j) {
      nonfinite_ += !is_finite(g[j]);
      nonzero_ += g[j] != 0;
      square_ += double(g[j]) * double(g[j]);
    }
  }

  __device__ __forceinline__ void store(Sums<T>& sums, const StepMemory<T>& memory) const {
    sums[kNonfinite] = T(nonfinite_);
    sums[kNonzero] = T(nonzero_);
    memory.squares[threadIdx.x] = square_;
  }

 private:
  unsigned nonfinite_ = 0, nonzero_ = 0;
  double square_ = 0;
};

/// Partial sums: kCounts, s_i.g per stored pair, |g|^2.
template <class T, class H, int Capacity>
__device__ void pass1(const Segments<Capacity>& table, const State& state, const Scaling& scaling,
                      const StepMemory<T>& memory, const Partials& partials) {
  const Rows<H> s = stored_rows<H>(state.s_ring, memory.ring());
  const T scale = T(scale_of(scaling));
  Cursor<Capacity> cursor(table);
  Sums<T> sums(memory.sums, kCounts + s.count);
  GradientSums<T> of_gradient;
  visit_segments<T, H>(cursor, Order::forward, [&](const auto& at) {
    constexpr int W = kPackWidth<decltype(at)>;
    if (!cursor.moves()) return;
    T g[W];
    add_products<Cache::keep>(s, at, g, sums, kCounts, [&] {
      load_gradient(cursor, at, scale, g);
      of_gradient.add(g);
    });
  });
  of_gradient.store(sums, memory);
  store_with_squares(memory, kCounts + s.count, partials);
}

/// Pass 1 without pairs.
template <class T, int Capacity>
__device__ void flags_pass(const Segments<Capacity>& table, const Scaling& scaling,
                           const StepMemory<T>& memory, const Partials& partials) {
  const T scale = T(scale_of(scaling));
  Cursor<Capacity> cursor(table);
  GradientSums<T> of_gradient;
  visit_segments<T, T, kPacksAtATime>(cursor, Order::forward, [&](const auto& at) {
    if (!cursor.moves()) return;
    T g[kPackWidth<decltype(at)>];
    load_gradient(cursor, at, scale, g);
    of_gradient.add(g);
  });
  Sums<T> sums(memory.sums, kCounts);
  of_gradient.store(sums, memory);
  store_with_squares(memory, kCounts, partials);
}

/// Flags, weights and u_i = s_i.q, from the partial sums of pass 1 and s_i.m.
template <class T>
__device__ void collect_projections(const State& state, const Scaling& scaling,
                                    const Averages& averages, const StepMemory<T>& memory,
                                    const Partials& partials) {
  const PairRing ring = memory.ring();
  const int square = kCounts + ring.pairs;
  sum_partials<T>(partials, square + 1, memory.totals);
  if (threadIdx.x == 0) {
    double* flags = memory.projections + memory.slots;
    flags[flag::nonfinite] = memory.totals[kNonfinite];
    if (scaling.found_inf) flags[flag::nonfinite] += *scaling.found_inf;
    flags[flag::nonzero] = memory.totals[kNonzero];
    flags[flag::square] = memory.totals[square];
  }
  weigh(averages, scaling.max_grad_norm, memory);
  const StepWeights& weights = *memory.weights;
  for (int age = threadIdx.x; age < memory.slots; age += blockDim.x) {
    const double s_g =
        age < ring.pairs ? finite_or_zero(weights.clip * memory.totals[kCounts + age]) : 0.0;
    const int slot = ring.slot(age);
    memory.projections[slot] = weights.look_ahead.projection(state.moments[slot], s_g);
  }
  __syncthreads();
}

template <class T>
size_t step_shared_bytes(const State& state) {
  return StepMemory<T>(nullptr, state.slots).bytes;
}

template <class T>
Shape one_block(const State& state) {
  return {dim3(1), kThreads<T>, step_shared_bytes<T>(state)};
}

/// Calls enqueue(table, range, shape) for every table, with blocks for rows of H.
template <class T, class H, class Enqueue>
cudaError_t for_each_step_launch(const Parameters& list, const State& state, Partials& partials,
                                 Enqueue enqueue) {
  return for_each_launch<T, kWidth<H>>(list, state, step_shared_bytes<T>(state), partials, enqueue);
}

/// Enqueues finish_step.
cudaError_t enqueue_finish(const State& state, double beta, const Queue& queue);

}  // namespace adaqn::cuda
