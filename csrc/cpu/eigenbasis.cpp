#include "eigenbasis.h"

#include <cmath>

#include "../common/kronecker.h"
#include "parallel.h"
#include "products.h"

namespace adaqn::cpu {
namespace {

// Columns of Q are the rows of matrices here: contiguous, and sorted by moving rows.

/// Rows that are eliminated at a time, and rows that take what those above them take off at once.
constexpr int64_t kBand = 8, kPanel = 64;
static_assert(kPanel % kBand == 0);

/// Eliminates the diagonal block of a band, which becomes R of its Cholesky decomposition R^T R.
/// False where it is not positive definite.
inline bool decompose_block(double* block, int64_t stride) {
  for (int64_t i = 0; i < kBand; ++i) {
    double* row = block + i * stride;
    for (int64_t l = 0; l < i; ++l) {
      const double factor = block[l * stride + i];
      for (int64_t j = i; j < kBand; ++j) row[j] -= factor * block[l * stride + j];
    }
    if (!(row[i] > 0)) return false;
    const double root = std::sqrt(row[i]);
    for (int64_t j = i; j < kBand; ++j) row[j] /= root;
  }
  return true;
}

/// Multiplies R^-T of a decomposed block onto the columns behind it.
inline void substitute_band(const double* block, int64_t stride, int64_t columns, double* behind) {
  for (int64_t i = 0; i < kBand; ++i) {
    double* row = behind + i * stride;
    for (int64_t l = 0; l < i; ++l) {
      const double* other = behind + l * stride;
      const double factor = block[l * stride + i];
#pragma omp simd
      for (int64_t j = 0; j < columns; ++j) row[j] -= factor * other[j];
    }
    const double inverse = 1 / block[i * stride + i];
    for (int64_t j = 0; j < columns; ++j) row[j] *= inverse;
  }
}

/// Of [G | W], with the upper triangle of G = R^T R, makes [R | R^-T W].  `height` is a multiple of
/// kBand.  False where G is not positive definite.
inline bool eliminate(double* matrix, int64_t stride, int64_t height, int64_t columns) {
  /// Takes what rows begin..k make of rows k..k+count from these, from column k on.
  const auto take_off = [&](int64_t begin, int64_t k, int64_t count) {
    const double* above = matrix + begin * stride + k;
    multiply<double>({count, columns - k, k - begin, above, stride, true, above, stride,
                      matrix + k * stride + k, stride, false, 1, -1});
  };
  for (int64_t panel = 0; panel < height; panel += kPanel) {
    const int64_t end = std::min(height, panel + kPanel);
    take_off(0, panel, end - panel);
    for (int64_t k = panel; k < end; k += kBand) {
      take_off(panel, k, kBand);
      double* band = matrix + k * stride + k;
      if (!decompose_block(band, stride)) return false;
      substitute_band(band, stride, columns - k - kBand, band + kBand);
    }
  }
  return true;
}

/// Scratch memory for the basis of one factor.
struct BasisBuffers {
  int64_t stride;
  int64_t height;       ///< the side, in whole bands
  int64_t wide_stride;  ///< of `system`
  double *matrix, *basis, *other, *image, *system, *quotients;
  int32_t *places, *order, *moved;

  BasisBuffers(Scratch& scratch, int64_t side)
      : stride(padded<double>(side)),
        height((side + kBand - 1) / kBand * kBand),
        wide_stride(padded<double>(2 * height)),
        matrix(scratch.take<double>(side * stride)),
        basis(scratch.take<double>(side * stride)),
        other(scratch.take<double>(side * stride)),
        image(scratch.take<double>(side * stride)),
        system(scratch.take<double>(height * wide_stride)),
        quotients(scratch.take<double>(side)),
        places(scratch.take<int32_t>(side)),
        order(scratch.take<int32_t>(side)),
        moved(scratch.take<int32_t>(side)) {}
};

/// Zeros in columns begin..end.
inline void clear_columns(double* matrix, int64_t stride, int64_t rows, int64_t begin,
                          int64_t end) {
  for (int64_t k = 0; k < rows; ++k) {
    std::fill(matrix + k * stride + begin, matrix + k * stride + end, 0.0);
  }
}

/// places = the order of the quotients from the largest on; NaN counts as largest.  Stable. Between
/// refreshes the order hardly changes.
inline void sort_descending(const double* quotients, int64_t n, int32_t* places) {
  const auto before = [](double a, double b) { return a > b || (a != a && b == b); };
  for (int64_t i = 0; i < n; ++i) {
    int64_t k = i;
    for (; k > 0 && before(quotients[i], quotients[places[k - 1]]); --k) places[k] = places[k - 1];
    places[k] = static_cast<int32_t>(i);
  }
}

/// Makes the rows in the right half of `system` orthonormal, with the positive diagonal of R, by
/// the decomposition of their Gram matrix.  False where that fails.
inline bool orthonormalise(const BasisBuffers& b, int64_t side) {
  double* rows = b.system + b.height;
  transpose(rows, b.wide_stride, side, side, b.image, b.stride);
  multiply<double>({side, side, side, rows, b.wide_stride, false, b.image, b.stride, b.system,
                    b.wide_stride, true});
  clear_columns(b.system, b.wide_stride, side, side, b.height);
  clear_columns(b.system, b.wide_stride, side, b.height + side, b.wide_stride);
  for (int64_t i = side; i < b.height; ++i) {  // the rest of the last band: the identity
    double* row = b.system + i * b.wide_stride;
    std::fill_n(row, b.wide_stride, 0.0);
    row[i] = 1;
  }
  if (!eliminate(b.system, b.wide_stride, b.height, b.height + side)) return false;
  double sum = 0;  // of zeros, unless an element is not finite
  for (int64_t k = 0; k < side; ++k) {
    const double* row = rows + k * b.wide_stride;
#pragma omp simd reduction(+ : sum)
    for (int64_t l = 0; l < side; ++l) sum += row[l] - row[l];
  }
  return sum == 0;
}

/// Sorts the rows by Rayleigh quotients, from the largest on; then Q = orth(A Q).  Where QR fails,
/// the sorted basis stays.
inline void iterate_subspace(BasisBuffers& b, int64_t side) {
  multiply<double>(
      {side, side, side, b.basis, b.stride, false, b.matrix, b.stride, b.image, b.stride});
  for (int64_t k = 0; k < side; ++k) {
    const double *q = b.basis + k * b.stride, *z = b.image + k * b.stride;
    double quotient = 0;
#pragma omp simd reduction(+ : quotient)
    for (int64_t l = 0; l < side; ++l) quotient += q[l] * z[l];
    b.quotients[k] = quotient;
  }
  sort_descending(b.quotients, side, b.places);
  double* rows = b.system + b.height;
  for (int64_t k = 0; k < side; ++k) {
    const int64_t place = b.places[k];
    b.moved[k] = b.order[place];
    std::copy_n(b.basis + place * b.stride, side, b.other + k * b.stride);
    std::copy_n(b.image + place * b.stride, side, rows + k * b.wide_stride);
  }
  std::swap(b.order, b.moved);
  std::swap(b.basis, b.other);
  if (!orthonormalise(b, side)) return;
  for (int64_t k = 0; k < side; ++k) {
    std::copy_n(rows + k * b.wide_stride, side, b.basis + k * b.stride);
  }
}

template <class T>
inline void refresh(Scratch scratch, int64_t side, int iterations, const T* factor, T* basis,
                    int32_t* order) {
  BasisBuffers b(scratch, side);
  for (int64_t k = 0; k < side; ++k) b.order[k] = static_cast<int32_t>(k);
  double mean = 0;
  for (int64_t k = 0; k < side; ++k) mean += factor[k * side + k];
  mean /= static_cast<double>(side);
  for (int64_t k = 0; k < side; ++k) {
    double* row = b.matrix + k * b.stride;
    for (int64_t l = 0; l < side; ++l) row[l] = factor[k * side + l] / mean;
    row[k] += kFactorDamping;
  }
  clear_columns(b.matrix, b.stride, side, side, b.stride);
  clear_columns(b.image, b.stride, side, side, b.stride);
  // through `other`, as the basis may be of another type
  for (int64_t k = 0; k < side; ++k) std::copy_n(basis + k * side, side, b.other + k * b.stride);
  transpose(b.other, b.stride, side, side, b.basis, b.stride);
  for (int i = 0; i < iterations; ++i) iterate_subspace(b, side);
  transpose(b.basis, b.stride, side, side, b.other, b.stride);
  for (int64_t k = 0; k < side; ++k) {
    const double* row = b.other + k * b.stride;
    for (int64_t l = 0; l < side; ++l) basis[k * side + l] = static_cast<T>(row[l]);
  }
  std::copy_n(b.order, side, order);
}

template <class T>
struct RefreshTask {
  Scratch scratch;
  int64_t side;
  int iterations;
  const T* factor;
  T* basis;
  int32_t* order;

  template <Isa isa>
  void run(int64_t, int64_t) const {
    refresh(scratch, side, iterations, factor, basis, order);
  }
};

}  // namespace

int64_t basis_scratch_bytes(int64_t side) {
  Scratch scratch;
  BasisBuffers(scratch, side);
  return scratch.bytes();
}

template <class T>
void refresh_basis(Scratch scratch, int64_t side, int iterations, const T* factor, T* basis,
                   int32_t* order) {
  RefreshTask<T> task{scratch, side, iterations, factor, basis, order};
  widest_runner<RefreshTask<T>>()(0, 1, &task);
}

template void refresh_basis(Scratch, int64_t, int, const float*, float*, int32_t*);
template void refresh_basis(Scratch, int64_t, int, const double*, double*, int32_t*);

}  // namespace adaqn::cpu
