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

/// Where an element of a row lies, of one row after the other: cheaper than to ask for each.
template <class H>
class RowAddress {
 public:
  __device__ __forceinline__ RowAddress(const Rows<H>& rows, int64_t element)
      : address_(reinterpret_cast<const unsigned char*>(rows.row(0) + element)),
        first_(reinterpret_cast<const unsigned char*>(rows.data + element)),
        stride_(rows.stride * sizeof(H)),
        wrap_(rows.slots - rows.oldest) {}

  __device__ __forceinline__ const H* get() const { return reinterpret_cast<const H*>(address_); }

  /// From row i - 1 to row i, which need not exist.
  __device__ __forceinline__ void go_to(int i) {
    address_ = i == wrap_ ? first_ : address_ + stride_;
  }

 private:
  const unsigned char* address_;
  const unsigned char* first_;  // where the ring begins
  int64_t stride_;              // bytes
  int wrap_;                    // the row that lies there
};

struct Nothing {
  __device__ __forceinline__ void operator()() const {}
};

/// Calls visit(i, elements) for every row, several loads ahead of the first visit, and before that
/// prepare(), which may wait for something else while the first rows are on their way.
template <Cache cache, class H, int W, class Visitor, class Prepare = Nothing>
__device__ __forceinline__ void visit_rows(const Rows<H>& rows, const Pack<W>& at, Visitor visit,
                                           Prepare prepare = {}) {
  RowAddress<H> row(rows, at.begin);
  int i0 = 0;
#pragma unroll 1
  do {
    H tile[kRowsInFlight][W];
#pragma unroll
    for (int k = 0; k < kRowsInFlight; ++k) {
      if (i0 + k < rows.count) load_vector<cache>(row.get(), tile[k]);
      row.go_to(i0 + k + 1);
    }
    if (i0 == 0) prepare();
#pragma unroll
    for (int k = 0; k < kRowsInFlight; ++k) {
      if (i0 + k < rows.count) visit(i0 + k, tile[k]);
    }
    i0 += kRowsInFlight;
  } while (i0 < rows.count);
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

/// sums[first + i] += row_i . x, which prepare() may bring.
template <Cache cache, class T, class H, int W, class Prepare = Nothing>
__device__ __forceinline__ void add_products(const Rows<H>& rows, const Pack<W>& at,
                                             const T (&x)[W], Sums<T>& sums, int first,
                                             Prepare prepare = {}) {
  auto add = [&](int i, const H(&elements)[W]) {
    T product = 0;
#pragma unroll
    for (int j = 0; j < W; ++j) product += convert<T>(elements[j]) * x[j];
    sums[first + i] += product;
  };
  visit_rows<cache>(rows, at, add, prepare);
}

}  // namespace adaqn::cuda
