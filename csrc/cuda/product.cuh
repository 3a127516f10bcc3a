// Products of matrices by one block: a patch of the result at a time, in registers, from panels of
// both operands in shared memory.
//
// An operand is anything that gives element k of row i by operator()(i, k) and tells by kAlongDepth
// whether k, and not i, is what moves fastest in memory.  Results go to a function, so that
// operands may lie anywhere and results become anything.
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

/// An operand whose rows are those of a matrix in memory.
template <class T>
struct RowsOf {
  static constexpr bool kAlongDepth = true;
  const T* data;
  int pitch;

  __device__ __forceinline__ T operator()(int i, int k) const { return data[i * pitch + k]; }
};
/// An operand whose rows are the columns of a matrix in memory.
template <class T>
struct ColumnsOf {
  static constexpr bool kAlongDepth = false;
  const T* data;
  int pitch;

  __device__ __forceinline__ T operator()(int i, int k) const { return data[k * pitch + i]; }
};
template <class T>
__device__ __forceinline__ RowsOf<T> rows_of(const T* data, int pitch) {
  return {data, pitch};
}
template <class T>
__device__ __forceinline__ ColumnsOf<T> columns_of(const T* data, int pitch) {
  return {data, pitch};
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
                                           int first_k, int depth) {
  constexpr bool kAlong = Operand::kAlongDepth;
  const int own_i = kAlong ? threadIdx.x / kDepth : threadIdx.x % kPatch;
  const int own_k = kAlong ? threadIdx.x % kDepth : threadIdx.x / kPatch;
#pragma unroll 4  // all in float32
  for (int n = 0; n < kPatch * kDepth / kThreads<T>; ++n) {
    const int i = own_i + (kAlong ? n * (kThreads<T> / kDepth) : 0);
    const int k = own_k + (kAlong ? 0 : n * (kThreads<T> / kPatch));
    const bool inside = first + i < rows && first_k + k < depth;
    panel[k * kPitch<T> + i] = inside ? operand(first + i, first_k + k) : T(0);
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
__device__ __forceinline__ void product(const Panels<T>& panels, int rows, int columns, int depth,
                                        const A& a, const B& b, Emit emit) {
  constexpr int kAcross = kPatch / kOwnColumns<T>;
  const int own_row = threadIdx.x / kAcross * kOwnRows;
  const int own_column = threadIdx.x % kAcross * kOwnColumns<T>;
  for (int top = 0; top < rows; top += kPatch) {
    for (int left = 0; left < columns; left += kPatch) {
      T sums[kOwnRows][kOwnColumns<T>] = {};
      for (int first_k = 0; first_k < depth; first_k += kDepth) {
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
