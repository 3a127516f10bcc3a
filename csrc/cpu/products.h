// Products of small dense matrices in row-major order.
#pragma once

#include <cstdint>

namespace adaqn::cpu {

/// Bytes by which the columns of a product are cut, at most; a row is read and written up to a
/// multiple of them.
constexpr int64_t kPanelBytes = 128;

/// Elements from one row to the next of a matrix in scratch memory.  A row fills whole panels; an
/// odd number of cache lines keeps the rows of a column apart in the cache.
template <class T>
constexpr int64_t padded(int64_t columns) {
  constexpr int64_t panel = kPanelBytes / sizeof(T);
  return (columns + panel - 1) / panel * panel + panel / 2;
}

/// C = keep C + scale A B.  B and C are in scratch memory, padded; what is behind the columns of C
/// is overwritten.  C is not read where keep is zero.
template <class T>
struct Product {
  int64_t rows;
  int64_t columns;
  int64_t depth;
  const T* a;  ///< rows x depth, or its transpose
  int64_t a_stride;
  bool transposed;
  const T* b;
  int64_t b_stride;
  T* c;
  int64_t c_stride;
  bool upper = false;  ///< what is left of the diagonal of C need not be computed
  T keep = 0;
  T scale = 1;
};

template <class T>
void multiply(const Product<T>& product);

/// `to` (columns x rows) becomes the transpose of `from` (rows x columns).
template <class T>
inline void transpose(const T* from, int64_t from_stride, int64_t rows, int64_t columns, T* to,
                      int64_t to_stride) {
  constexpr int64_t block = 8;
  for (int64_t i = 0; i < rows; i += block) {
    const int64_t height = rows - i < block ? rows - i : block;
    for (int64_t j = 0; j < columns; j += block) {
      const int64_t width = columns - j < block ? columns - j : block;
      const T* source = from + i * from_stride + j;
      T* target = to + j * to_stride + i;
      for (int64_t l = 0; l < width; ++l) {
        for (int64_t k = 0; k < height; ++k) {
          target[l * to_stride + k] = source[k * from_stride + l];
        }
      }
    }
  }
}

/// What is left of the diagonal becomes what is right of it.
template <class T>
inline void mirror_upper(T* matrix, int64_t stride, int64_t side) {
  constexpr int64_t block = 16;
  for (int64_t i = 0; i < side; i += block) {
    for (int64_t j = i; j < side; ++j) {
      const int64_t end = j < i + block ? j : i + block;
      for (int64_t k = i; k < end; ++k) matrix[j * stride + k] = matrix[k * stride + j];
    }
  }
}

}  // namespace adaqn::cpu
