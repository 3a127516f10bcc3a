// Which block works on which elements: one contiguous slice of the flat vector per block.

#pragma once

#include <cstdint>

#include "memory.cuh"

namespace adaqn::cuda {

/// Threads of a block, for vectors of T.
template <class T>
constexpr int kThreads = 1024 / sizeof(T);

/// Elements that a thread takes at a time: 16 bytes of a row of H.
template <class H>
constexpr int kWidth = 16 / sizeof(H);

enum class Order { forward, backward };

/// Packs that a thread takes at a time where a pass reads one or two vectors.
constexpr int kPacksAtATime = 4;

/// Calls visit(packs) for packs that make up this block's slice of [first, end): W elements wide
/// where they are aligned, inside [first, end) and fits(i, width), else 1 wide; and N of those of W
/// elements at a time where all of them fit.
template <int W, int N, int Threads, class Fits, class Visitor>
__device__ __forceinline__ void visit_slice(int64_t first, int64_t end, bool aligned, Order order,
                                            Fits fits, Visitor visit) {
  // A thread takes units of `width` elements, which begin at multiples of it.
  constexpr int kGrain = 32;                     // units: slices begin at whole warps
  constexpr int kUnits = (N - 1) * Threads + 1;  // from the first of N units to the last
  const int width = aligned ? W : 1;
  const int64_t first_unit = first / width, end_unit = (end + width - 1) / width;
  int64_t size = (end_unit - first_unit + gridDim.x - 1) / gridDim.x;
  size = (size + kGrain - 1) / kGrain * kGrain;
  const int64_t from = first_unit + blockIdx.x * size;
  const int64_t to = from + size < end_unit ? from + size : end_unit;
  auto is_whole = [&](int64_t i, int elements) {
    return aligned && i >= first && i + elements <= end && fits(i, elements);
  };
  const int chunks = to > from ? int((to - from + N * Threads - 1) / (N * Threads)) : 0;
  for (int k = 0; k < chunks; ++k) {
    const int chunk = order == Order::forward ? k : chunks - 1 - k;
    int64_t unit = from + int64_t(chunk) * N * Threads + threadIdx.x;
    if (N > 1 && unit + kUnits <= to && is_whole(unit * W, kUnits * W)) {
      visit(Packs<W, N>{unit * W, Threads * W});
      continue;
    }
#pragma unroll 1
    for (int n = 0; n < N && unit < to; ++n, unit += Threads) {
      const int64_t i = unit * width;
      if (is_whole(i, W)) {
        visit(Pack<W>{i});
        continue;
      }
      for (int64_t j = i < first ? first : i; j < i + width && j < end; ++j) {
        if (fits(j, 1)) visit(Pack<1>{j});
      }
    }
  }
}

/// Calls visit(pack) for packs that make up this block's slice of [0, numel).
template <class T, int W, class Visitor>
__device__ __forceinline__ void visit_flat(int64_t numel, bool aligned, Order order,
                                           Visitor visit) {
  visit_slice<W, 1, kThreads<T>>(
      0, numel, aligned, order, [](int64_t, int) { return true; }, visit);
}

}  // namespace adaqn::cuda
