// The few numbers that steer an operation, in shared memory, and what is computed from them.
//
// Vector kernels only read the control words, into shared memory as their first act.  They are
// written by kernels of one block in between, or past the last grid barrier of the fused step, so
// no block ever sees them half changed.
#pragma once

#include "../common/acceptance.h"
#include "../common/averages.h"
#include "recursions.cuh"
#include "reduce.cuh"
#include "shared.cuh"

namespace adaqn::cuda {

/// Whether the latest step may change anything that lasts, and so whether what follows it may.
__device__ __forceinline__ bool accepts_step(const State& state) {
  return step_is_accepted(state.projections + state.slots, state.counters);
}

/// Weight of each of `count` iterates in their average.
template <class T>
__device__ __forceinline__ T share_of_one(int64_t count) {
  return T(1 / double(count > 1 ? count : 1));
}

/// Numbers by which a step multiplies whole vectors, beside the coefficients of ring rows.
struct StepWeights {
  LookAhead look_ahead;
  double clip;        // of the gradient
  double correction;  // of v
  double cap;         // of p
};

/// What a pass over m and v takes from Averages and StepWeights, in the type of arithmetic.
template <class T>
struct AverageFactors {
  T beta, rest;           // m = beta m + rest g
  T of_old, of_gradient;  // q = of_old m + of_gradient g, with m as it was
  T keep, add;            // v = keep v + add g^2
  T correction, eps;      // D = 1 / sqrt(correction v + eps)
  T scalar;               // D without an accumulator

  __device__ AverageFactors(const Averages& averages, const StepWeights& weights, double scalar_)
      : beta(T(averages.beta)),
        rest(T(1 - averages.beta)),
        of_old(T(weights.look_ahead.of_old)),
        of_gradient(T(weights.look_ahead.of_gradient)),
        keep(T(averages.keep)),
        add(T(averages.add)),
        correction(T(weights.correction)),
        eps(T(averages.eps)),
        scalar(T(scalar_)) {}
};

/// Sums of pass 1 before those of the stored pairs.
enum : int { kNonfinite, kNonzero, kCounts };

/// Shared memory of the step's kernels, with vectors of T.
template <class T>
struct StepMemory {
  int slots;
  int64_t* counters;
  StepWeights* weights;
  AverageFactors<T>* average_factors;
  double* projections;   // u by slot, then the flags
  double* images;        // z by slot, then |H0 q|^2
  double* totals;        // sums over all blocks, in the order of their partials
  double* coefficients;  // a by age, and then c
  T* factors;            // of the linear combination at hand, by age
  double* triangle;      // the same memory as what follows, and done with before that is used
  double* squares;       // the sum of squares of each thread: T would overflow where |g| does not
  T* sums;
  size_t bytes;

  __host__ __device__ StepMemory(unsigned char* base, int slots_) : slots(slots_) {
    Carver carver(base);
    counters = carver.take<int64_t>(counter::count);
    weights = carver.take<StepWeights>(1);
    average_factors = carver.take<AverageFactors<T>>(1);
    projections = carver.take<double>(slots + flag::count);
    images = carver.take<double>(slots + 1);
    totals = carver.take<double>(slots + flag::count);
    coefficients = carver.take<double>(slots + PairTriangle::kTerms);
    factors = carver.take<T>(slots);
    Carver alternative = carver;
    triangle = alternative.take<double>(slots * PairTriangle::pitch_of(slots));
    squares = carver.take<double>(kThreads<T>);
    sums = carver.take<T>((slots + kCounts) * kThreads<T>);
    bytes = carver.bytes() > alternative.bytes() ? carver.bytes() : alternative.bytes();
  }

  __device__ const double* flags() const { return projections + slots; }
  __device__ PairRing ring() const { return PairRing(counters, slots); }
  __device__ PairTriangle aged_gram() const { return PairTriangle(triangle, ring()); }
  __device__ bool accepted() const { return step_is_accepted(flags(), counters); }
};

/// to[0..count-1] = from[0..count-1].  All threads of the block call it, and synchronise after.
template <class U>
__device__ __forceinline__ void copy_words(U* to, const U* from, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) to[i] = from[i];
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

/// The look-ahead of the step, by one warp: two lanes take a power each.
__device__ __forceinline__ LookAhead look_ahead_by_warp(const int64_t* counters, double beta) {
  if (beta == 0) return LookAhead(0, 0, 0);
  const double power = pow(beta, LookAhead::step(counters) + threadIdx.x % 2);
  const double now = __shfl_sync(0xffffffffu, power, 0);
  return LookAhead(beta, now, __shfl_sync(0xffffffffu, power, 1));
}

/// All weights but the cap, from counters and flags.  All threads of the block call it; the weights
/// are there after its last line.  Powers take long: two warps share them, and few steps need them.
template <class T>
__device__ void weigh(const Averages& averages, double max_grad_norm, const StepMemory<T>& memory) {
  StepWeights& weights = *memory.weights;
  if (threadIdx.x < 32) {
    const LookAhead look_ahead = look_ahead_by_warp(memory.counters, averages.beta);
    if (threadIdx.x == 0) {
      weights.look_ahead = look_ahead;
      weights.clip = clip_factor(memory.flags(), max_grad_norm);
    }
  }
  if (threadIdx.x == 32) {
    weights.correction = bias_correction(memory.counters, averages.keep, averages.correct_bias);
  }
  __syncthreads();
}

/// Brings what the recursions need of gram.  All threads of the block call it, past a barrier
/// behind the last use of the sums.
template <class T>
__device__ void load_triangle(const State& state, const StepMemory<T>& memory) {
  load_triangle(state.gram, memory.ring(), memory.aged_gram());
  __syncthreads();
}

/// a, from projections.  All threads of the block call it; a is there after its last line.
template <class T>
__device__ void solve_backward(const StepMemory<T>& memory) {
  if (threadIdx.x == 0) {
    solve_by_rows(memory.aged_gram(), memory.ring(), memory.projections, memory.coefficients);
  }
  __syncthreads();
}

/// c in the place of a, from images, in the same way.
template <class T>
__device__ void solve_forward(const StepMemory<T>& memory) {
  if (threadIdx.x < 32) {
    solve_by_columns(memory.aged_gram(), memory.ring(), memory.images, memory.coefficients);
  }
  __syncthreads();
}

/// The last act of a step: s_i.m and the counters move on.  All threads of one block call it.
template <class T>
__device__ void finish_step(const State& state, const StepMemory<T>& memory) {
  const bool accepted = memory.accepted();
  for (int i = threadIdx.x; accepted && i < memory.slots; i += blockDim.x) {
    const LookAhead& look_ahead = memory.weights->look_ahead;
    state.moments[i] = look_ahead.next_moment(state.moments[i], memory.projections[i]);
  }
  if (threadIdx.x == 0) {
    count_step(state.counters, memory.flags(), accepted, state.fisher_size);
  }
}

}  // namespace adaqn::cuda
