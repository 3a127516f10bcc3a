// The two ways in which a pass reads a ring: a linear combination of its rows, and their products
// with a vector.  All of the algorithm's memory traffic is in here.

#pragma once

#include <cstdint>

#include "../common/ring.h"
#include "memory.cuh"
#include "slices.cuh"

namespace adaqn::cuda {

/// Rows read ahead: what a thread has in flight at a time.
constexpr int kRowsInFlight = 6;

/// `count` rows of a ring from the oldest on; row i lies in slot (oldest + i) % slots.
template <class H>
struct Rows {
  const H* data;
  int64_t stride;
  int oldest, slots, count;

  __device__ __forceinline__ int slot(int i) const {
    const int row = oldest + i;
    return row < slots ? row : row - slots;
  }
  __device__ __forceinline__ const H* row(int i) const { return data + slot(i) * stride; }
};

/// The stored pairs' half that lies in `ring`.
template <class H>
__device__ __forceinline__ Rows<H> stored_rows(const Ring& ring, const PairRing& pairs) {
  return {static_cast<const H*>(ring.data), ring.stride, pairs.oldest, pairs.slots, pairs.pairs};
}

/// Calls visit(i, elements) for every row, several loads ahead of the first visit.
template <Cache cache, class H, int W, class Visitor>
__device__ __forceinline__ void visit_rows(const Rows<H>& rows, const Pack<W>& at, Visitor visit) {
#pragma unroll 1
  for (int i0 = 0; i0 < rows.count; i0 += kRowsInFlight) {
    H tile[kRowsInFlight][W];
#pragma unroll
    for (int k = 0; k < kRowsInFlight; ++k) {
      if (i0 + k < rows.count) load_vector<cache>(rows.row(i0 + k) + at.begin, tile[k]);
    }
#pragma unroll
    for (int k = 0; k < kRowsInFlight; ++k) {
      if (i0 + k < rows.count) visit(i0 + k, tile[k]);
    }
  }
}

/// x += sum_i coefficients[i] row_i
template <Cache cache, class T, class H, int W>
__device__ __forceinline__ void add_combination(const Rows<H>& rows, const T* coefficients,
                                                const Pack<W>& at, T (&x)[W]) {
  visit_rows<cache>(rows, at, [&](int i, const H(&elements)[W]) {
    const T c = coefficients[i];
#pragma unroll
    for (int j = 0; j < W; ++j) x[j] += c * convert<T>(elements[j]);
  });
}

/// Sums of one thread, in shared memory: as many as a ring has rows, which no register file holds.
template <class T>
class Sums {
 public:
  __device__ Sums(T* memory, int count) : memory_(memory) {
    for (int i = 0; i < count; ++i) (*this)[i] = 0;
  }
  __device__ __forceinline__ T& operator[](int i) { return memory_[i * kThreads<T> + threadIdx.x]; }

 private:
  T* memory_;
};

/// sums[first + i] += row_i . x
template <Cache cache, class T, class H, int W>
__device__ __forceinline__ void add_products(const Rows<H>& rows, const Pack<W>& at,
                                             const T (&x)[W], Sums<T>& sums, int first) {
  visit_rows<cache>(rows, at, [&](int i, const H(&elements)[W]) {
    T product = 0;
#pragma unroll
    for (int j = 0; j < W; ++j) product += convert<T>(elements[j]) * x[j];
    sums[first + i] += product;
  });
}

}  // namespace adaqn::cuda
