// Products of many rows with one vector, and sums of many rows, one block of columns at a time.
//
// R is the dtype of the rows in memory, T that of arithmetic and of blocks.  Lanes of a product are
// as wide as the machine's vectors and at most a block long; the sums of blocks are doubles, and so
// are squares, which neither overflow nor vanish then.
#pragma once

#include <cstdint>
#include <vector>

#include "number.h"

namespace adaqn::cpu {

/// A matrix in memory: rows of `columns` elements, `stride` apart.
struct Matrix {
  void* data;
  Dtype dtype;
  int64_t rows;
  int64_t columns;
  int64_t stride;
};

template <class R>
R* row(const Matrix& matrix, int64_t index) {
  return static_cast<R*>(matrix.data) + index * matrix.stride;
}

/// The one row of a vector that may be null: no row then.
template <class T>
std::vector<const T*> optional_row(const void* vector) {
  if (vector == nullptr) return {};
  return {static_cast<const T*>(vector)};
}

/// sums[i] += rows[i][at..at+n] . x
template <class T, class R>
inline void add_products(const std::vector<const R*>& rows, int64_t at, int64_t n, const T* x,
                         double* sums) {
  size_t i = 0;
  for (; i + 4 <= rows.size(); i += 4) {
    const R *r0 = rows[i] + at, *r1 = rows[i + 1] + at;
    const R *r2 = rows[i + 2] + at, *r3 = rows[i + 3] + at;
    T s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
    for (int64_t k = 0; k < n; ++k) {
      s0 += widen(r0[k]) * x[k];
      s1 += widen(r1[k]) * x[k];
      s2 += widen(r2[k]) * x[k];
      s3 += widen(r3[k]) * x[k];
    }
    sums[i] += s0;
    sums[i + 1] += s1;
    sums[i + 2] += s2;
    sums[i + 3] += s3;
  }
  for (; i < rows.size(); ++i) {
    const R* r = rows[i] + at;
    T s = 0;
#pragma omp simd reduction(+ : s)
    for (int64_t k = 0; k < n; ++k) s += widen(r[k]) * x[k];
    sums[i] += s;
  }
}

/// sums[i] += rows[i][at..at+n] . x and others[i] += rows[i][at..at+n] . y, of which rows are read
/// once.
template <class T, class R>
inline void add_two_products(const std::vector<const R*>& rows, int64_t at, int64_t n, const T* x,
                             const T* y, double* sums, double* others) {
  size_t i = 0;
  for (; i + 2 <= rows.size(); i += 2) {
    const R *r0 = rows[i] + at, *r1 = rows[i + 1] + at;
    T x0 = 0, x1 = 0, y0 = 0, y1 = 0;
#pragma omp simd reduction(+ : x0, x1, y0, y1)
    for (int64_t k = 0; k < n; ++k) {
      x0 += widen(r0[k]) * x[k];
      x1 += widen(r1[k]) * x[k];
      y0 += widen(r0[k]) * y[k];
      y1 += widen(r1[k]) * y[k];
    }
    sums[i] += x0;
    sums[i + 1] += x1;
    others[i] += y0;
    others[i + 1] += y1;
  }
  const std::vector<const R*> last(rows.begin() + static_cast<int64_t>(i), rows.end());
  add_products(last, at, n, x, sums + i);
  add_products(last, at, n, y, others + i);
}

/// x += sum_i coefficients[i] rows[i][at..at+n]
template <class T, class R>
inline void add_combination(const std::vector<const R*>& rows, const std::vector<T>& coefficients,
                            int64_t at, int64_t n, T* x) {
  size_t i = 0;
  for (; i + 4 <= rows.size(); i += 4) {
    const R *r0 = rows[i] + at, *r1 = rows[i + 1] + at;
    const R *r2 = rows[i + 2] + at, *r3 = rows[i + 3] + at;
    const T c0 = coefficients[i], c1 = coefficients[i + 1];
    const T c2 = coefficients[i + 2], c3 = coefficients[i + 3];
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) {
      x[k] += c0 * widen(r0[k]) + c1 * widen(r1[k]) + c2 * widen(r2[k]) + c3 * widen(r3[k]);
    }
  }
  for (; i < rows.size(); ++i) {
    const R* r = rows[i] + at;
    const T c = coefficients[i];
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) x[k] += c * widen(r[k]);
  }
}

/// |x|^2
template <class T>
inline double sum_of_squares(const T* x, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < n; ++k) {
    const double wide = x[k];
    sum += wide * wide;
  }
  return sum;
}

}  // namespace adaqn::cpu
