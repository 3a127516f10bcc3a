// The table of matrices, passed to kernels by value: which tile and which factor is where.
#pragma once

#include "../common/kronecker.h"
#include "launch.cuh"
#include "product.cuh"

namespace adaqn::cuda {

/// Matrices that one table holds; see kSmallTable.
constexpr int kSmallMatrices = 32, kLargeMatrices = 256;

/// Elements of a parameter without factors that count as a tile.
constexpr int64_t kChunk = kPatch * kPatch;

/// Matrices 0..count-1 of a table, in the order of the flat vector.
template <int Capacity>
struct Matrices {
  static constexpr int kCapacity = Capacity;
  int64_t words[Capacity][entry::count];
  void* param[Capacity];         // the matrix's first element
  const void* grad[Capacity];    // null: the parameter stands still
  int64_t order[Capacity];       // where the orders of its factors begin
  int32_t factor[Capacity + 1];  // number of its first factor
  int32_t tile[Capacity + 1];    // tiles of the table before its own
  uint8_t group[Capacity];       // counted from the table's first group
  Type param_type[Capacity];
  Type grad_type[Capacity];
  int count;

  __device__ KroneckerMatrix matrix(int m) const { return KroneckerMatrix(words[m]); }
  __device__ bool moves(int m) const { return grad[m] != nullptr; }
  __device__ int tiles() const { return tile[count]; }
  __device__ int factors() const { return factor[count] - factor[0]; }
};

/// The last matrix with begin[m] <= i; those of which there is nothing are passed over.
__device__ __forceinline__ int find_matrix(const int32_t* begin, int count, int32_t i) {
  int low = 0, high = count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (begin[middle] <= i ? low : high) = middle;
  }
  return low;
}

// ------------------------------------------------------------------ tiles

/// A basis, and the factor's turn and order; none where `offset` is negative.
struct Side {
  int64_t offset, order, turn;
};

/// A tile of a matrix, or a chunk of a parameter without factors, as one row.
struct Tile {
  int matrix;
  int rows, columns;
  int64_t flat;    // first element in flat vectors
  int64_t stride;  // elements between rows there
  int64_t offset;  // first element, counted from the matrix's
  Side left, right;

  __device__ bool is_factored() const { return left.offset >= 0 || right.offset >= 0; }
  __host__ __device__ static int64_t count(const KroneckerMatrix& matrix) {
    return matrix.factored() ? matrix.tiles() : (matrix.numel() + kChunk - 1) / kChunk;
  }
  __host__ __device__ static int64_t largest(const KroneckerMatrix& matrix) {
    if (matrix.factored()) return matrix.rows.largest() * matrix.columns.largest();
    return matrix.numel() < kChunk ? matrix.numel() : kChunk;
  }
};

/// Calls visit(e, at) for every element of a tile: e counts them, and `at` is how far it lies from
/// the first one in flat vectors and in the parameter.
template <class T, class Visitor>
__device__ __forceinline__ void for_each_of_tile(const Tile& tile, Visitor visit) {
  for_each_element<T>(tile.rows, tile.columns,
                      [&](int e, int i, int j) { visit(e, i * tile.stride + j); });
}

template <int Capacity>
__device__ Tile locate_tile(const Matrices<Capacity>& table, int32_t number) {
  const int m = find_matrix(table.tile, table.count, number);
  const KroneckerMatrix matrix = table.matrix(m);
  const int64_t n = number - table.tile[m];
  Tile tile{};
  tile.matrix = m;
  tile.left.offset = tile.right.offset = -1;
  if (!matrix.factored()) {
    const int64_t begin = n * kChunk, rest = matrix.numel() - begin;
    tile.rows = 1;
    tile.columns = int(rest < kChunk ? rest : kChunk);
    tile.flat = matrix.start + begin;
    tile.offset = begin;
    return tile;
  }
  const int64_t i = n / matrix.columns.pieces, j = n % matrix.columns.pieces;
  tile.rows = int(matrix.rows.size(i));
  tile.columns = int(matrix.columns.size(j));
  tile.flat = matrix.tile(i, j);
  tile.stride = matrix.columns.length;
  tile.offset = tile.flat - matrix.start;
  int64_t order = table.order[m], turn = matrix.turn;
  if (matrix.has_left()) {
    tile.left = {matrix.left_factor(i), order + matrix.rows.begin(i), turn + i};
    order += matrix.rows.length;
    turn += matrix.rows.pieces;
  }
  if (matrix.has_right()) {
    tile.right = {matrix.right_factor(j), order + matrix.columns.begin(j), turn + j};
  }
  return tile;
}

// ------------------------------------------------------------------ factors

/// A factor, and its strip of the matrix: `side` rows for L, or columns for R.
struct Factor {
  bool is_left;
  int matrix;
  int side, depth;
  int64_t first, pitch;  // elements of the matrix: before the strip, and between rows
  int64_t offset, order, turn;
};

template <int Capacity>
__device__ Factor locate_factor(const Matrices<Capacity>& table, int32_t number) {
  Factor factor{};
  const int m = factor.matrix = find_matrix(table.factor, table.count, number);
  const KroneckerMatrix matrix = table.matrix(m);
  const int64_t lefts = matrix.has_left() ? matrix.rows.pieces : 0, n = number - table.factor[m];
  factor.is_left = n < lefts;
  factor.pitch = matrix.columns.length;
  factor.order = table.order[m];
  factor.turn = matrix.turn + n;
  if (factor.is_left) {
    factor.side = int(matrix.rows.size(n));
    factor.depth = int(matrix.columns.length);
    factor.first = matrix.rows.begin(n) * factor.pitch;
    factor.order += matrix.rows.begin(n);
    factor.offset = matrix.left_factor(n);
  } else {
    factor.side = int(matrix.columns.size(n - lefts));
    factor.depth = int(matrix.rows.length);
    factor.first = matrix.columns.begin(n - lefts);
    factor.order += (lefts > 0 ? matrix.rows.length : 0) + factor.first;
    factor.offset = matrix.right_factor(n - lefts);
  }
  return factor;
}

// ------------------------------------------------------------------ on the host

/// Matrices [first, next) of the list, which one table holds, and what has been counted before.
struct MatrixRange {
  int64_t first = 0, next = 0;
  int64_t factor = 0, next_factor = 0;
  int64_t order = 0, next_order = 0;
  int32_t kind = 0;    // of all their averages
  TableRange tensors;  // the parameters that they are of, for their rates
};

inline KroneckerMatrix matrix_of(const Kronecker& kronecker, int64_t m) {
  return KroneckerMatrix(kronecker.table + m * entry::count);
}

inline int32_t kind_of(const Kronecker& kronecker, int64_t m) {
  return kronecker.kinds ? kronecker.kinds[m] : 0;
}

/// Sides of all factors of a matrix: the length of their orders.
inline int64_t orders_of(const KroneckerMatrix& matrix) {
  return (matrix.has_left() ? matrix.rows.length : 0) +
         (matrix.has_right() ? matrix.columns.length : 0);
}

/// The range after `last`.
inline MatrixRange next_range(const Parameters& list, const Kronecker& kronecker,
                              const MatrixRange& last) {
  MatrixRange range{last.next,       last.next, last.next_factor, last.next_factor, last.next_order,
                    last.next_order, 0,         last.tensors};
  range.tensors.first_group = -1;
  if (range.next < kronecker.matrices) range.kind = kind_of(kronecker, range.next);
  for (; range.next < kronecker.matrices; ++range.next) {
    if (kind_of(kronecker, range.next) != range.kind) break;
    const KroneckerMatrix matrix = matrix_of(kronecker, range.next);
    if (range.next - range.first == kLargeMatrices) break;
    if (list.count > 0) {
      const int32_t group = list.tensors[matrix.param].group;
      if (range.tensors.first_group < 0) range.tensors.first_group = group;
      if (group - range.tensors.first_group >= kTableGroups) break;
      range.tensors.next_tensor = matrix.param + 1;
    }
    range.next_factor += matrix.factors();
    range.next_order += orders_of(matrix);
  }
  return range;
}

/// Where matrix m of the list lies in its parameter; `flat` is where that one begins.
template <int Capacity>
void set_tensor(Matrices<Capacity>& table, int n, const KroneckerMatrix& matrix,
                const Tensor& tensor, int64_t flat, int32_t first_group) {
  const int64_t offset = matrix.start - flat;
  table.param[n] = static_cast<char*>(tensor.param) + offset * bytes_of(tensor.param_type);
  if (tensor.grad) {
    table.grad[n] = static_cast<const char*>(tensor.grad) + offset * bytes_of(tensor.grad_type);
  }
  table.param_type[n] = tensor.param_type;
  table.grad_type[n] = tensor.grad_type;
  table.group[n] = uint8_t(tensor.group - first_group);
}

template <int Capacity>
void fill_table(Matrices<Capacity>& table, const Parameters& list, const Kronecker& kronecker,
                const MatrixRange& range) {
  int64_t factor = range.factor, order = range.order, tile = 0, tensor = 0, flat = 0;
  int n = 0;
  for (int64_t m = range.first; m < range.next; ++m, ++n) {
    const int64_t* words = kronecker.table + m * entry::count;
    const KroneckerMatrix matrix(words);
    std::copy(words, words + entry::count, table.words[n]);
    table.order[n] = order;
    table.factor[n] = int32_t(factor);
    table.tile[n] = int32_t(tile);
    factor += matrix.factors();
    order += orders_of(matrix);
    tile += Tile::count(matrix);
    if (list.count == 0) continue;
    while (tensor < matrix.param) flat += list.tensors[tensor++].numel;
    set_tensor(table, n, matrix, list.tensors[tensor], flat, range.tensors.first_group);
  }
  table.factor[n] = int32_t(factor);
  table.tile[n] = int32_t(tile);
  table.count = n;
}

/// Calls function(table, range) for tables that together hold all matrices, in order: one at least,
/// if an empty one.
template <class Function>
cudaError_t for_each_table(const Parameters& list, const Kronecker& kronecker, Function function) {
  MatrixRange range;
  do {
    range = next_range(list, kronecker, range);
    if (range.next - range.first <= kSmallMatrices) {
      Matrices<kSmallMatrices> table{};
      fill_table(table, list, kronecker, range);
      ADAQN_CUDA_TRY(function(table, range));
    } else {
      Matrices<kLargeMatrices> table{};
      fill_table(table, list, kronecker, range);
      ADAQN_CUDA_TRY(function(table, range));
    }
  } while (range.next < kronecker.matrices);
  return cudaSuccess;
}

}  // namespace adaqn::cuda
