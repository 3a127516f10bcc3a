// The few numbers that steer an operation, in shared memory, and what is computed from them.
//
// Vector kernels only read the control words, into shared memory as their first act.  They are
// written by kernels of one block in between, or past the last grid barrier of the fused step, so
// no block ever sees them half changed.
#pragma once

#include "../common/acceptance.h"
#include "../common/recursion.h"
#include "reduce.cuh"

namespace adaqn::cuda {

/// Weight of each of `count` iterates in their average.
template <class T>
__device__ __forceinline__ T share_of_one(int64_t count) {
  return T(1 / double(count > 1 ? count : 1));
}

/// Hands out consecutive parts of shared memory.
class Carver {
 public:
  __host__ __device__ explicit Carver(unsigned char* base) : at_(base), base_(base) {}

  template <class U>
  __host__ __device__ U* take(int64_t count) {
    U* part = reinterpret_cast<U*>(at_);
    at_ += (count * sizeof(U) + 15) / 16 * 16;
    return part;
  }
  __host__ __device__ unsigned char* position() const { return at_; }
  __host__ __device__ size_t bytes() const { return size_t(at_ - base_); }

 private:
  unsigned char *at_, *base_;
};

/// A block's dynamic shared memory.
__device__ __forceinline__ unsigned char* shared_memory() {
#ifdef ADAQN_DYNAMIC_SHARED  // the host emulation brings its own
  return ADAQN_DYNAMIC_SHARED();
#else
  extern __shared__ uint4 memory[];
  return reinterpret_cast<unsigned char*>(memory);
#endif
}

/// Shared memory of the step's kernels, with vectors of T.
template <class T>
struct StepMemory {
  int slots;
  int64_t* counters;
  double* projections;  // u by slot, then the flags
  double* images;       // z by slot
  double* totals;       // sums over all blocks, in the order of their partials
  double *a, *c;        // coefficients by slot
  T* factors;           // of the linear combination at hand, by slot
  double* gram;         // the same memory as `sums`, and done with before those are used
  T* sums;
  size_t bytes;

  __host__ __device__ StepMemory(unsigned char* base, int slots_) : slots(slots_) {
    Carver carver(base);
    counters = carver.take<int64_t>(counter::count);
    projections = carver.take<double>(slots + flag::count);
    images = carver.take<double>(slots);
    totals = carver.take<double>(slots + flag::count);
    a = carver.take<double>(slots);
    c = carver.take<double>(slots);
    factors = carver.take<T>(slots);
    Carver alternative = carver;
    gram = alternative.take<double>((slots + 1) * slots);
    sums = carver.take<T>((slots + flag::count) * kThreads<T>);
    bytes = carver.bytes() > alternative.bytes() ? carver.bytes() : alternative.bytes();
  }

  __device__ const double* flags() const { return projections + slots; }
  __device__ PairRing ring() const { return PairRing(counters, slots); }
  __device__ bool accepted() const { return step_is_accepted(flags(), counters); }
};

/// to[0..count-1] = from[0..count-1].  All threads of the block call it, and synchronise after.
template <class U>
__device__ __forceinline__ void copy_words(U* to, const U* from, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) to[i] = from[i];
}

/// Brings gram into shared memory and lets one thread call solve(gram, ring).  All threads of the
/// block call it; what `solve` wrote is there after its last line.
template <class T, class Solve>
__device__ void with_gram(const State& state, const StepMemory<T>& memory, Solve solve) {
  __syncthreads();
  copy_words(memory.gram, state.gram, (memory.slots + 1) * memory.slots);
  __syncthreads();
  if (threadIdx.x == 0) solve(static_cast<const double*>(memory.gram), memory.ring());
  __syncthreads();
}

/// a, from projections.
template <class T>
__device__ void solve_backward(const State& state, const StepMemory<T>& memory) {
  with_gram(state, memory, [&](const double* gram, const PairRing& ring) {
    backward_coefficients(gram, ring, memory.projections, memory.a);
  });
}

/// c, from a and images.
template <class T>
__device__ void solve_forward(const State& state, const StepMemory<T>& memory) {
  with_gram(state, memory, [&](const double* gram, const PairRing& ring) {
    forward_coefficients(gram, ring, memory.a, memory.images, memory.c);
  });
}

}  // namespace adaqn::cuda
