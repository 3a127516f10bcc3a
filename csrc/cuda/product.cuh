// Products of matrices by one block: a patch of the result at a time, in registers, from panels of
// both operands in shared memory.
//
// An operand is anything that gives element k of row i by operator()(i, k) and tells by
// `is_along_depth` whether k or i is what moves fastest in memory.  Results go to a function, so
// that operands may lie anywhere and results become anything.
#pragma once

#include <cstdint>

#include "memory.cuh"
#include "shared.cuh"
#include "slices.cuh"

namespace adaqn::cuda {

/// Rows and columns of a patch.
constexpr int kPatch = 64;
/// Columns of the operands that a panel holds.
constexpr int kDepth = 16;
/// Rows and columns of a patch that a thread has in registers.
constexpr int kOwnRows = 4;
template <class T>
constexpr int kOwnColumns = kPatch * kPatch / (kOwnRows * kThreads<T>);
/// Elements between columns of a panel: 16 bytes more than a patch, against bank conflicts.
template <class T>
constexpr int kPitch = kPatch + 16 / int(sizeof(T));

/// A matrix in memory, or its transpose.
template <class T>
struct View {
  const T* data;
  int64_t row_stride, depth_stride;

  __device__ __forceinline__ T operator()(int64_t i, int64_t k) const {
    return data[i * row_stride + k * depth_stride];
  }
  __device__ __forceinline__ bool is_along_depth() const { return depth_stride == 1; }
};

/// Rows of the matrix are rows of the operand.
template <class T>
__device__ __forceinline__ View<T> rows_of(const T* data, int64_t pitch) {
  return {data, pitch, 1};
}

/// Columns of the matrix are rows of the operand.
template <class T>
__device__ __forceinline__ View<T> columns_of(const T* data, int64_t pitch) {
  return {data, 1, pitch};
}

/// Calls visit(e, i, j) for e = i columns + j, element by element of a rows x columns matrix.
template <class T, class Visitor>
__device__ __forceinline__ void for_each_element(int rows, int columns, Visitor visit) {
  const int size = rows * columns;
  const int further_rows = kThreads<T> / columns, further_columns = kThreads<T> % columns;
  int i = threadIdx.x / columns, j = threadIdx.x % columns;
#pragma unroll 4
  for (int e = threadIdx.x; e < size; e += kThreads<T>) {
    visit(e, i, j);
    i += further_rows;
    j += further_columns;
    if (j >= columns) {
      j -= columns;
      ++i;
    }
  }
}

/// Shared memory of a product: column k of an operand from k kPitch on.
template <class T>
struct Panels {
  T *a, *b;

  __host__ __device__ explicit Panels(Carver& carver)
      : a(carver.take<T>(kDepth * kPitch<T>)), b(carver.take<T>(kDepth * kPitch<T>)) {}
};

/// Rows first.. and columns first_k.. of an operand of rows x depth, with zeros around it.
template <class T, class Operand>
__device__ __forceinline__ void fill_panel(T* panel, const Operand& operand, int first, int rows,
                                           int64_t first_k, int64_t depth) {
  const bool along_depth = operand.is_along_depth();
#pragma unroll
  for (int n = 0; n < kPatch * kDepth / kThreads<T>; ++n) {
    const int e = threadIdx.x + n * kThreads<T>;
    const int i = along_depth ? e / kDepth : e % kPatch;
    const int k = along_depth ? e % kDepth : e / kPatch;
    const bool inside = first + i < rows && first_k + k < depth;
    panel[k * kPitch<T> + i] = inside ? T(operand(first + i, first_k + k)) : T(0);
  }
}

template <class T>
__device__ __forceinline__ void add_panels(const Panels<T>& panels, int own_row, int own_column,
                                           T (&sums)[kOwnRows][kOwnColumns<T>]) {
#pragma unroll
  for (int k = 0; k < kDepth; ++k) {
    T a[kOwnRows], b[kOwnColumns<T>];
    load_vector<Cache::keep>(panels.a + k * kPitch<T> + own_row, a);
    load_vector<Cache::keep>(panels.b + k * kPitch<T> + own_column, b);
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) {
#pragma unroll
      for (int j = 0; j < kOwnColumns<T>; ++j) sums[i][j] += a[i] * b[j];
    }
  }
}

/// Calls emit(i, j, sum over k of a(i, k) b(j, k)) for a of rows x depth and b of columns x depth.
/// All threads of the block call it; what they wrote before is seen, and what `emit` writes is
/// there after its last line.  Nothing that `emit` writes is read by an operand.
template <class T, class A, class B, class Emit>
__device__ __forceinline__ void product(const Panels<T>& panels, int rows, int columns,
                                        int64_t depth, const A& a, const B& b, Emit emit) {
  constexpr int kAcross = kPatch / kOwnColumns<T>;
  const int own_row = threadIdx.x / kAcross * kOwnRows;
  const int own_column = threadIdx.x % kAcross * kOwnColumns<T>;
  for (int top = 0; top < rows; top += kPatch) {
    for (int left = 0; left < columns; left += kPatch) {
      T sums[kOwnRows][kOwnColumns<T>] = {};
      for (int64_t first_k = 0; first_k < depth; first_k += kDepth) {
        __syncthreads();
        fill_panel(panels.a, a, top, rows, first_k, depth);
        fill_panel(panels.b, b, left, columns, first_k, depth);
        __syncthreads();
        add_panels(panels, own_row, own_column, sums);
      }
#pragma unroll
      for (int i = 0; i < kOwnRows; ++i) {
#pragma unroll
        for (int j = 0; j < kOwnColumns<T>; ++j) {
          const int row = top + own_row + i, column = left + own_column + j;
          if (row < rows && column < columns) emit(row, column, sums[i][j]);
        }
      }
    }
  }
  __syncthreads();
}

}  // namespace adaqn::cuda
