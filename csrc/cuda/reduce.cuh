// Sums over all elements in a fixed order: threads into a block's partial sums, in float64, and
// those into totals.  No atomics, so the same input gives the same bits.

#pragma once

#include "rows.cuh"

namespace adaqn::cuda {

/// Partial sums: row i holds one word per block of every launch that contributes to it.
struct Partials {
  double* data;
  int64_t columns;
  int64_t first;  // column of this launch's first block

  /// The same columns from row i on.
  __host__ __device__ __forceinline__ Partials from(int64_t i) const {
    return {data + i * columns, columns, first};
  }
};

/// The sum over the lanes of a warp, the same bits in every lane.
__device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x += __shfl_xor_sync(0xffffffffu, x, mask);
  return x;
}

/// The largest x of a block for vectors of T, the same in every thread; `memory` has a word per
/// warp, which others may read up to the barrier before.  All threads of the block call it.
template <class T>
__device__ T block_max(T x, T* memory) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    const T other = __shfl_xor_sync(0xffffffffu, x, mask);
    x = other > x ? other : x;
  }
  if (threadIdx.x % 32 == 0) memory[threadIdx.x / 32] = x;
  __syncthreads();
  for (int i = 0; i < kThreads<T> / 32; ++i) x = memory[i] > x ? memory[i] : x;
  return x;
}

/// Adds up `memory`, where Sums put them, over the threads of a block for vectors of T: sum i goes
/// to out[i * stride].  All threads of the block call it.
template <class T, class Sum>
__device__ void store_sums(const Sum* memory, int count, double* out, int64_t stride) {
  __syncthreads();
  const int lane = threadIdx.x % 32;
  for (int i = threadIdx.x / 32; i < count; i += kThreads<T> / 32) {
    double sum = 0;
    for (int t = lane; t < kThreads<T>; t += 32) sum += memory[i * kThreads<T> + t];
    sum = warp_sum(sum);
    if (lane == 0) out[i * stride] = sum;
  }
}

/// The same, into rows 0..count-1 of `partials`.
template <class T, class Sum>
__device__ void store_partials(const Sum* memory, int count, const Partials& partials) {
  store_sums<T>(memory, count, partials.data + partials.first + blockIdx.x, partials.columns);
}

/// Totals of rows 0..count-1 of `partials` to out[i].  All threads of the block call it; the
/// totals are there after its last line.
template <class T>
__device__ void sum_partials(const Partials& partials, int count, double* out) {
  const int lane = threadIdx.x % 32;
  for (int i = threadIdx.x / 32; i < count; i += kThreads<T> / 32) {
    double sum = 0;
    for (int64_t k = lane; k < partials.columns; k += 32) sum += partials.from(i).data[k];
    sum = warp_sum(sum);
    if (lane == 0) out[i] = sum;
  }
  __syncthreads();
}

}  // namespace adaqn::cuda
