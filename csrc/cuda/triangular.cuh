// The recursions of ../common/recursion.h and ../common/secant.h by one block, for any number of
// pairs: panels of as many pairs as a warp has lanes.  What the solved panels contribute to the
// next one is summed by all warps, and the panel itself solved by one.  Coefficients are by age.
#pragma once

#include "reduce.cuh"
#include "shared.cuh"

namespace adaqn::cuda {

constexpr int kPanel = 32;
constexpr int kSolveThreads = 512, kSolveWarps = kSolveThreads / 32;

/// gram by age.
struct Triangle {
  const double* gram;
  PairRing ring;

  /// s_i.y_j
  __device__ __forceinline__ double at(int i, int j) const {
    return gram[int64_t(ring.slot(i)) * ring.slots + ring.slot(j)];
  }
};

/// Shared memory of the solves.
struct PanelMemory {
  double* block;  // s_i.y_j of the panel
  double* sums;   // by warp and pair of the panel
  size_t bytes;

  __host__ __device__ explicit PanelMemory(unsigned char* base) {
    Carver carver(base);
    block = carver.take<double>(kPanel * kPitch);
    sums = carver.take<double>(kSolveWarps * kPanel);
    bytes = carver.bytes();
  }

  static constexpr int kPitch = kPanel + 1;  // without bank conflicts
  __device__ __forceinline__ double& at(int i, int j) const { return block[i * kPitch + j]; }
};

/// Pairs begin..begin+count-1 into `memory`; where there are fewer than kPanel, those of the
/// identity, which change nothing.
__device__ __forceinline__ void load_panel(const Triangle& triangle, int begin, int count,
                                           const PanelMemory& memory) {
  for (int k = int(threadIdx.x); k < kPanel * kPanel; k += kSolveThreads) {
    const int i = k / kPanel, j = k % kPanel;
    const bool stored = i <= j && j < count;
    memory.at(i, j) = stored ? triangle.at(begin + i, begin + j) : double(i == j);
  }
}

/// memory.sums[k] = sum_{j newer than the panel} a_j s_k.y_j  for its pairs k.
__device__ __forceinline__ void sum_newer(const Triangle& triangle, int begin, int count,
                                          const double* a, const PanelMemory& memory) {
  constexpr int kRows = kPanel / kSolveWarps;
  const int first = int(threadIdx.x / 32) * kRows, lane = int(threadIdx.x % 32);
  double sums[kRows] = {};
#pragma unroll 4
  for (int j = begin + count + lane; j < triangle.ring.pairs; j += 32) {
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      if (first + k < count) sums[k] += a[j] * triangle.at(begin + first + k, j);
    }
  }
#pragma unroll
  for (int k = 0; k < kRows; ++k) {
    const double sum = warp_sum(sums[k]);
    if (lane == 0) memory.sums[first + k] = sum;
  }
}

/// memory.sums[warp][k] = sum_{j older than the panel} c_j s_j.y_k  for its pairs k, over every
/// kSolveWarps-th j.
__device__ __forceinline__ void sum_older(const Triangle& triangle, int begin, int count,
                                          const double* c, const PanelMemory& memory) {
  const int warp = int(threadIdx.x / 32), lane = int(threadIdx.x % 32);
  double sum = 0;
#pragma unroll 4
  for (int j = warp; j < begin; j += kSolveWarps) {
    if (lane < count) sum += c[j] * triangle.at(j, begin + lane);
  }
  memory.sums[warp * kPanel + lane] = sum;
}

/// R a = u with u by slot.  Calls visit(age, a) for every pair, newest panel first, by one warp
/// whose lanes have consecutive pairs; lanes without one have an age past the last.  `a` is memory
/// of the block's own, global or shared.
template <class Visitor>
__device__ __forceinline__ void solve_newest_first(const Triangle& triangle, const double* u,
                                                   const PanelMemory& memory, double* a,
                                                   Visitor visit) {
  const int pairs = triangle.ring.pairs, lane = int(threadIdx.x % 32);
  for (int begin = (pairs - 1) / kPanel * kPanel; begin >= 0 && pairs > 0; begin -= kPanel) {
    const int count = pairs - begin < kPanel ? pairs - begin : kPanel;
    load_panel(triangle, begin, count, memory);
    sum_newer(triangle, begin, count, a, memory);
    __syncthreads();
    if (threadIdx.x < 32) {
      const double inverse = 1 / memory.at(lane, lane);
      double rest = lane < count ? u[triangle.ring.slot(begin + lane)] - memory.sums[lane] : 0.0;
      double own = 0;
#pragma unroll 4
      for (int k = kPanel - 1; k >= 0; --k) {
        const double solved = __shfl_sync(0xffffffffu, rest * inverse, k);
        if (lane == k) own = solved;
        if (lane < k) rest -= solved * memory.at(lane, k);
      }
      if (lane < count) a[begin + lane] = own;
      visit(begin + lane, own);
    }
    __syncthreads();
  }
}

/// R^T c = diag(R) c0 - factor z with z by slot, and c0 where c will be.
__device__ __forceinline__ void solve_oldest_first(const Triangle& triangle, double factor,
                                                   const double* z, const PanelMemory& memory,
                                                   double* c) {
  const int pairs = triangle.ring.pairs, lane = int(threadIdx.x % 32);
  for (int begin = 0; begin < pairs; begin += kPanel) {
    const int count = pairs - begin < kPanel ? pairs - begin : kPanel;
    load_panel(triangle, begin, count, memory);
    sum_older(triangle, begin, count, c, memory);
    __syncthreads();
    if (threadIdx.x < 32) {
      const double inverse = 1 / memory.at(lane, lane);
      const bool stored = lane < count;
      const double start = stored ? c[begin + lane] : 0.0;
      double sum = stored ? factor * z[triangle.ring.slot(begin + lane)] : 0.0;
      for (int warp = 0; warp < kSolveWarps; ++warp) sum += memory.sums[warp * kPanel + lane];
      double own = 0;
#pragma unroll 4
      for (int k = 0; k < kPanel; ++k) {
        const double solved = __shfl_sync(0xffffffffu, start - sum * inverse, k);
        if (lane == k) own = solved;
        if (lane > k) sum += solved * memory.at(k, lane);
      }
      if (stored) c[begin + lane] = own;
    }
    __syncthreads();
  }
}

/// Products over pairs from the newest one on, by one warp whose lanes have consecutive pairs.
class NewestFirstProduct {
 public:
  /// The product over all pairs newer than this lane's, which takes part with x from now on.
  __device__ __forceinline__ double before(double x) {
    const int lane = int(threadIdx.x % 32);
    double product = x;  // over this lane and the following ones
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const int other = lane + offset;
      const double theirs = __shfl_sync(0xffffffffu, product, other < 32 ? other : lane);
      if (other < 32) product *= theirs;
    }
    const double next = __shfl_sync(0xffffffffu, product, lane < 31 ? lane + 1 : lane);
    const double newer = total_ * (lane < 31 ? next : 1.0);
    total_ *= __shfl_sync(0xffffffffu, product, 0);
    return newer;
  }
  __device__ __forceinline__ double total() const { return total_; }

 private:
  double total_ = 1;
};

}  // namespace adaqn::cuda
