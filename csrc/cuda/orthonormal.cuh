// Orthonormal columns by one block: block Gram-Schmidt, up to kPatch columns at a time, where each
// such panel takes rounds of Cholesky-QR.
//
// Every round multiplies the columns with an upper triangle of positive diagonal, so the result is
// the Q of the QR decomposition with a positive diagonal of R, in any number of rounds.  One round
// does for well-conditioned columns.  Of a column that nearly depends on those before, the Gram
// matrix knows too little: it is left with what those take out of it and is dealt with in the next
// round, where that is all there is of it.
#pragma once

#include "product.cuh"

namespace adaqn::cuda {

/// Rounds after which a panel is given up; columns of rank one, but for damping, take three.
constexpr int kRounds = 8;

/// Share of every column's square that must be left, once what earlier columns say is taken out,
/// for the round to be the last: |Q^T Q - I| is at most about the rounding error over that.
constexpr double kSafeShare = 0.1;

/// Share below which what is left is too inexact to be taken out of later columns.
template <class T>
constexpr T kLeastShare = sizeof(T) == 8 ? T(1e-9) : T(1e-4);

/// Scratch, beside a square matrix as large as that of the columns.
template <class T>
struct PanelWords {
  T *squares, *pivots;  // by column of the panel

  __host__ __device__ explicit PanelWords(Carver& carver)
      : squares(carver.take<T>(kPatch)), pivots(carver.take<T>(kPatch)) {}
};

/// Columns 0..width-1 of z, `pitch` elements between its rows.
template <class T>
struct Panel {
  T* z;
  int rows, width, pitch;
};

/// squares[j] = |z_j|^2.  They are there after the next barrier.
template <class T>
__device__ void square_columns(const Panel<T>& panel, T* squares) {
  for (int j = threadIdx.x; j < panel.width; j += kThreads<T>) {
    T sum = 0;
    for (int i = 0; i < panel.rows; ++i) {
      const T z = panel.z[i * panel.pitch + j];
      sum += z * z;
    }
    squares[j] = sum;
  }
}

/// z_j = z_j - sum over k < j of z_k (z_k.z_j) / |z_k|^2, each z_k as it has become, by elimination
/// in the Gram matrix; then every z_j is divided by its norm.  Columns with less than kLeastShare
/// are not taken out, and divided by less than their norm was.  The smallest share that was left of
/// a column's square, or kLeastShare; zero where one is not finite or a column is zero.
template <class T>
__device__ T eliminate(const Panel<T>& panel, T* gram, const PanelWords<T>& words) {
  constexpr int kFurther = kThreads<T> / kPatch;
  const int width = panel.width, first = threadIdx.x / kPatch, j = threadIdx.x % kPatch;
  T least = 1;
  for (int k = 0; k < width; ++k) {
    const T square = words.squares[k], pivot = gram[k * width + k];
    if (!(square > 0) || !is_finite(square) || !is_finite(pivot)) return 0;
    const T floor = kLeastShare<T> * square;
    const bool inexact = pivot < floor;
    if (threadIdx.x == 0) words.pivots[k] = inexact ? floor : pivot;
    if (inexact) {
      least = kLeastShare<T>;
      continue;
    }
    if (pivot < least * square) least = pivot / square;
    if (k < j && j < width) {
      const T factor = gram[k * width + j] / pivot;
#pragma unroll 1  // registers are scarce
      for (int i = k + 1 + first; i <= j; i += kFurther) {
        gram[i * width + j] -= gram[k * width + i] * factor;
      }
      T* row = panel.z + first * panel.pitch;
#pragma unroll 2
      for (int i = first; i < panel.rows; i += kFurther) {
        row[j] -= row[k] * factor;
        row += kFurther * panel.pitch;
      }
    }
    __syncthreads();
  }
  __syncthreads();
  for_each_element<T>(panel.rows, width, [&](int, int i, int column) {
    panel.z[i * panel.pitch + column] /= sqrt(words.pivots[column]);
  });
  __syncthreads();
  return least;
}

/// Makes columns first..first+width-1 of z (side x side) orthonormal, and orthogonal to those
/// before, which are orthonormal.
template <class T>
__device__ bool orthonormalise_panel(const Panels<T>& panels, T* z, int side, int first, int width,
                                     T* scratch, const PanelWords<T>& words) {
  const Panel<T> panel{z + first, side, width, side};
  for (int round = 0; round < kRounds; ++round) {
    square_columns(panel, words.squares);
    if (first > 0) {
      product(panels, first, width, side, columns_of(z, side), columns_of(panel.z, side),
              [=](int i, int j, T value) { scratch[i * width + j] = value; });
      product(panels, side, width, first, rows_of(z, side), columns_of(scratch, width),
              [&](int i, int j, T value) { panel.z[i * side + j] -= value; });
    }
    product(panels, width, width, side, columns_of(panel.z, side), columns_of(panel.z, side),
            [=](int i, int j, T value) { scratch[i * width + j] = value; });
    const T least = eliminate(panel, scratch, words);
    if (!(least > 0)) return false;
    if (least >= T(kSafeShare)) return true;
  }
  return false;
}

/// Replaces z (side x side) by the Q of its QR decomposition with a positive diagonal of R, where
/// that succeeds; else z is left as anything.  `scratch` is as large as z.  All threads of the
/// block call it, and all get the same answer.
template <class T>
__device__ bool orthonormalise(const Panels<T>& panels, T* z, int side, T* scratch,
                               const PanelWords<T>& words) {
  for (int first = 0; first < side; first += kPatch) {
    const int width = side - first < kPatch ? side - first : kPatch;
    if (!orthonormalise_panel(panels, z, side, first, width, scratch, words)) return false;
  }
  return true;
}

}  // namespace adaqn::cuda
