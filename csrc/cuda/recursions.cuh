// The recursions of ../common/recursion.h by one block, for the pairs of a step: two per lane of a
// warp at the most.  Every sum has its terms in the order there, so the bits are the same.
//
// The second loop goes column by column: as soon as a coefficient is known, all lanes add its term
// to sums of their own.  In the first one the term that a sum begins with is the last to be known,
// so one thread goes from row to row; of several terms at a time it waits for memory once.
// Coefficients are by age.
#pragma once

#include "../common/ring.h"
#include "shared.cuh"

namespace adaqn::cuda {

/// s_i.y_j by age with j not older than i: rows in shared memory, which zeros follow.
struct PairTriangle {
  static constexpr int kTerms = 8;  // that the first loop takes at a time

  double* words;
  int pitch;

  __host__ __device__ static int pitch_of(int pairs) { return pairs + kTerms - 1; }

  __device__ PairTriangle(double* words_, const PairRing& ring)
      : words(words_), pitch(pitch_of(ring.pairs)) {}

  __device__ __forceinline__ double* row(int i) const { return words + i * pitch; }
};

/// All threads of the block call it, and synchronise after.
__device__ __forceinline__ void load_triangle(const double* gram, const PairRing& ring,
                                              const PairTriangle& triangle) {
  const int lane = int(threadIdx.x) % 32, warps = int(blockDim.x) / 32;
  for (int i = int(threadIdx.x) / 32; i < ring.pairs; i += warps) {
    const double* from = gram + int64_t(ring.slot(i)) * ring.slots;
#pragma unroll 1
    for (int j = i + lane; j < triangle.pitch; j += 32) {
      triangle.row(i)[j] = j < ring.pairs ? from[ring.slot(j)] : 0.0;
    }
  }
}

/// a, from u by slot, as backward_coefficients has it.  One thread calls it; `a` has room for
/// PairTriangle::kTerms more.
__device__ __forceinline__ void solve_by_rows(const PairTriangle& triangle, const PairRing& ring,
                                              const double* u, double* a) {
  for (int k = 0; k < PairTriangle::kTerms; ++k) a[ring.pairs + k] = 0;
#pragma unroll 1
  for (int i = ring.pairs - 1; i >= 0; --i) {
    const double* row = triangle.row(i);
    double rest = u[ring.slot(i)];
#pragma unroll 1
    for (int newer = i + 1; newer < ring.pairs; newer += PairTriangle::kTerms) {
#pragma unroll
      for (int k = 0; k < PairTriangle::kTerms; ++k) rest -= a[newer + k] * row[newer + k];
    }
    a[i] = rest / row[i];
  }
}

/// c in the place of a, from z by slot, as forward_coefficients has it.  One warp calls it.
__device__ __forceinline__ void solve_by_columns(const PairTriangle& triangle, const PairRing& ring,
                                                 const double* z, double* c) {
  constexpr int kOwn = 2;  // pairs of a lane, 32 apart
  const int lane = int(threadIdx.x) % 32;
  double start[kOwn], sum[kOwn], pivot[kOwn];
#pragma unroll
  for (int k = 0; k < kOwn; ++k) {
    const int own = lane + 32 * k;
    const bool stored = own < ring.pairs;
    start[k] = stored ? c[own] : 0.0;
    sum[k] = stored ? z[ring.slot(own)] : 0.0;
    pivot[k] = stored ? triangle.row(own)[own] : 1.0;
  }
#pragma unroll
  for (int half = 0; half < kOwn; ++half) {
    const int end = ring.pairs < 32 * (half + 1) ? ring.pairs : 32 * (half + 1);
#pragma unroll 1
    for (int i = 32 * half; i < end; ++i) {
      const double solved = __shfl_sync(0xffffffffu, start[half] - sum[half] / pivot[half], i % 32);
      if (lane == i % 32) c[i] = solved;
#pragma unroll
      for (int k = half; k < kOwn; ++k) {
        const int own = lane + 32 * k;
        if (own > i && own < ring.pairs) sum[k] += solved * triangle.row(i)[own];
      }
    }
  }
}

}  // namespace adaqn::cuda
