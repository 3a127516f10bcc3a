// A factor's eigenbasis by one block: subspace iterations from the basis as it is.
//
// In the type of the state, where the reference goes on in float64: a factor in float32 determines
// its eigenvectors no better, and orthonormalise takes as many rounds as the columns need.
#pragma once

#include "../common/kronecker.h"
#include "orthonormal.cuh"

namespace adaqn::cuda {

/// Three square matrices and what goes with their columns, in shared memory or in global memory.
template <class T>
struct BasisMemory {
  T *basis, *image, *spare;
  T* quotients;
  int32_t *places, *before;
  PanelWords<T> words;

  __host__ __device__ BasisMemory(Carver& carver, int64_t side)
      : basis(carver.take<T>(side * side)),
        image(carver.take<T>(side * side)),
        spare(carver.take<T>(side * side)),
        quotients(carver.take<T>(side)),
        places(carver.take<int32_t>(side)),
        before(carver.take<int32_t>(side)),
        words(carver) {}
};

/// A factor divided by its mean eigenvalue, and damped; not a number where the factor is zero.
template <class T>
struct Damped {
  static constexpr bool kAlongDepth = true;
  const T* factor;
  int side;
  T mean;

  __device__ Damped(const T* factor_, int side_) : factor(factor_), side(side_), mean(0) {
    for (int i = 0; i < side; ++i) mean += factor[i * side + i];
    mean /= T(side);
  }
  __device__ __forceinline__ T operator()(int i, int k) const {
    return factor[i * side + k] / mean + (i == k ? T(kFactorDamping) : T(0));
  }
};

/// Rayleigh quotients of the columns of the basis; as in the reference, the largest is what is not
/// a number.
template <class T>
__device__ void find_quotients(int side, const BasisMemory<T>& memory) {
  for (int j = threadIdx.x; j < side; j += kThreads<T>) {
    T sum = 0;
    for (int i = 0; i < side; ++i) {
      sum += memory.basis[i * side + j] * memory.image[i * side + j];
    }
    memory.quotients[j] = sum == sum ? sum : T(INFINITY);
  }
  __syncthreads();
}

/// places[k]: which column has the k-th largest quotient, the first ones first among equals.  They
/// are there after the next barrier.
template <class T>
__device__ void find_places(int side, const BasisMemory<T>& memory) {
  for (int j = threadIdx.x; j < side; j += kThreads<T>) {
    const T own = memory.quotients[j];
    int rank = 0;
    for (int k = 0; k < side; ++k) {
      const T other = memory.quotients[k];
      rank += other > own || (other == own && k < j);
    }
    memory.places[rank] = j;
  }
}

/// order = order of places, which are there for all threads after it.
template <class T>
__device__ void compose_order(int side, int32_t* order, const BasisMemory<T>& memory) {
  for (int k = threadIdx.x; k < side; k += kThreads<T>) memory.before[k] = order[k];
  __syncthreads();
  for (int k = threadIdx.x; k < side; k += kThreads<T>) order[k] = memory.before[memory.places[k]];
}

/// to = from with its columns in the order of places.
template <class T>
__device__ void sort_columns(int side, const T* from, T* to, const BasisMemory<T>& memory) {
  for_each_element<T>(side, side,
                      [&](int e, int i, int k) { to[e] = from[i * side + memory.places[k]]; });
  __syncthreads();
}

/// Sorts the columns of the basis by Rayleigh quotients, from the largest on;  Q = orth(A Q), or
/// the sorted basis where that fails.
template <class T>
__device__ void iterate_subspace(const Panels<T>& panels, const Damped<T>& matrix, int side,
                                 int32_t* order, BasisMemory<T>& memory) {
  T* image = memory.image;
  product(panels, side, side, side, matrix, columns_of(memory.basis, side),
          [=](int i, int j, T value) { image[i * side + j] = value; });
  find_quotients(side, memory);
  find_places(side, memory);
  compose_order(side, order, memory);
  sort_columns(side, memory.basis, memory.spare, memory);
  sort_columns(side, image, memory.basis, memory);
  if (orthonormalise(panels, memory.basis, side, image, memory.words)) return;
  T* sorted = memory.spare;
  memory.spare = memory.basis;
  memory.basis = sorted;
}

/// Turns `basis` towards the eigenvectors of `factor`; column k of it was column order[k].  All
/// threads of the block call it.
template <class T>
__device__ void refresh_basis(const Panels<T>& panels, const T* factor, T* basis, int side,
                              int iterations, int32_t* order, BasisMemory<T> memory) {
  const Damped<T> matrix(factor, side);
  for_each_element<T>(side, side, [&](int e, int, int) { memory.basis[e] = basis[e]; });
  for (int k = threadIdx.x; k < side; k += kThreads<T>) order[k] = k;
  for (int n = 0; n < iterations; ++n) iterate_subspace(panels, matrix, side, order, memory);
  for_each_element<T>(side, side, [&](int e, int, int) { basis[e] = memory.basis[e]; });
  __syncthreads();  // who still reads what the next factor's basis takes the place of
}

}  // namespace adaqn::cuda
