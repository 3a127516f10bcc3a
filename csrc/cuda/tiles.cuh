// What becomes of one tile: v takes in the gradient, and H0 is applied.
//
// A tile passes through two buffers by turns.  Products take it from one to the other, whatever is
// done element by element stays in place, in the same order of elements, so that threads find there
// what they wrote.
#pragma once

#include "control.cuh"
#include "matrices.cuh"

namespace adaqn::cuda {

/// The buffers of a tile, in shared memory or in global memory.
template <class T>
struct TileMemory {
  T *x, *other;

  __host__ __device__ TileMemory(Carver& carver, int64_t elements)
      : x(carver.take<T>(elements)), other(carver.take<T>(elements)) {}

  __device__ void swap() {
    T* turned = other;
    other = x;
    x = turned;
  }
};

/// What is made of v:  1 / D = sqrt(correction (v + floor max v) + eps).
template <class T>
struct Spectrum {
  T correction, floor, eps;
};

/// Q on the way back, and Q^T.
template <bool back, class T>
__device__ __forceinline__ auto operand_of(const T* q, int side) {
  if constexpr (back) {
    return rows_of(q, side);
  } else {
    return columns_of(q, side);
  }
}

/// x = Q_L^T x Q_R, or x = Q_L x Q_R^T on the way back; a side without basis has the identity.
template <bool back, class T>
__device__ void rotate(const Panels<T>& panels, const Tile& tile, const T* bases,
                       TileMemory<T>& memory) {
  const int rows = tile.rows, columns = tile.columns;
  if (tile.left.offset >= 0) {
    const T* q = bases + tile.left.offset;
    T* to = memory.other;
    product(panels, rows, columns, rows, operand_of<back>(q, rows), columns_of(memory.x, columns),
            [=](int i, int j, T value) { to[i * columns + j] = value; });
    memory.swap();
  }
  if (tile.right.offset >= 0) {
    const T* q = bases + tile.right.offset;
    T* to = memory.other;
    product(panels, rows, columns, columns, rows_of(memory.x, columns),
            operand_of<back>(q, columns),
            [=](int i, int j, T value) { to[i * columns + j] = value; });
    memory.swap();
  }
}

/// v of the tile in the order of the columns of bases that have been refreshed in this call.
template <class T>
__device__ void permute(const Tile& tile, const int32_t* rows, const int32_t* columns, T* v,
                        const TileMemory<T>& memory) {
  if (!rows && !columns) return;
  for_each_element<T>(tile.rows, tile.columns, [&](int e, int i, int j) {
    memory.x[e] = v[(rows ? rows[i] : i) * tile.stride + (columns ? columns[j] : j)];
  });
  __syncthreads();
  for_each_of_tile<T>(tile, [&](int e, int64_t at) { v[at] = memory.x[e]; });
}

/// v = keep v + add x^2.
template <class T>
__device__ void take_in(const Tile& tile, const AverageFactors<T>& factors, T* v,
                        const TileMemory<T>& memory) {
  for_each_of_tile<T>(tile, [&](int e, int64_t at) {
    v[at] = factors.keep * v[at] + factors.add * memory.x[e] * memory.x[e];
  });
}

/// x = x D, or x / D with `inverse`.
template <class T>
__device__ void scale_by_spectrum(const Tile& tile, const Spectrum<T>& spectrum, bool inverse,
                                  const T* v, T* warps, const TileMemory<T>& memory) {
  T under = 0;
  if (tile.is_factored()) {
    T largest = 0;
    for_each_of_tile<T>(tile,
                        [&](int, int64_t at) { largest = v[at] > largest ? v[at] : largest; });
    under = spectrum.floor * block_max(largest, warps);
  }
  for_each_of_tile<T>(tile, [&](int e, int64_t at) {
    const T root = sqrt(spectrum.correction * (v[at] + under) + spectrum.eps);
    memory.x[e] = inverse ? memory.x[e] * root : memory.x[e] / root;
  });
}

}  // namespace adaqn::cuda
