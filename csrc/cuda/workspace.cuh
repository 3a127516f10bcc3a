// Memory of the Kronecker operations: of a block, and between the launches of a call.
#pragma once

#include "eigenbasis.cuh"
#include "launch.cuh"
#include "matrices.cuh"
#include "tiles.cuh"

namespace adaqn::cuda {

/// Control words as they were before the step.
struct Snapshot {
  int64_t counters[counter::count];
  double square;
};

/// Scratch of a block: in global memory, or where `data` is null in its shared memory.
struct Scratch {
  unsigned char* data;
  size_t bytes;

  __device__ unsigned char* of_block(unsigned char* shared) const {
    return data ? data + blockIdx.x * bytes : shared;
  }
};

/// What launches leave for each other.
struct Workspace {
  Partials partials;  // of pass 1
  Snapshot* before;   // null: control words have not been copied
  int32_t* orders;    // by factor, the places that the columns of its basis had
  Scratch of_factors, of_tiles;
};

/// Numbers that the kernels of a call share, beside those of StepMemory.
template <class T>
struct Words {
  T scale;               // from a gradient as given to the clipped one to descend
  Spectrum<T> spectrum;  // after the call
};

/// Shared memory of the kernels on factors and tiles.
template <class T>
struct KroneckerMemory {
  StepMemory<T> step;
  Carver carver;
  Words<T>* words;
  T* warps;
  Panels<T> panels;

  __host__ __device__ explicit KroneckerMemory(unsigned char* base)
      : step(base, 0),
        carver(base + step.bytes),
        words(carver.take<Words<T>>(1)),
        warps(carver.take<T>(32)),
        panels(carver) {}

  __host__ __device__ size_t bytes() const { return step.bytes + carver.bytes(); }
};

// ------------------------------------------------------------------ on the host

/// Sizes of a call.
struct Sizes {
  int64_t factors = 0, orders = 0, tiles = 0;
  int64_t longest_side = 0, largest_tile = 0;

  explicit Sizes(const Kronecker& kronecker) {
    for (int64_t m = 0; m < kronecker.matrices; ++m) {
      const KroneckerMatrix matrix = matrix_of(kronecker, m);
      factors += matrix.factors();
      orders += orders_of(matrix);
      tiles += Tile::count(matrix);
      largest_tile = std::max(largest_tile, Tile::largest(matrix));
      if (matrix.has_left()) longest_side = std::max(longest_side, matrix.rows.largest());
      if (matrix.has_right()) longest_side = std::max(longest_side, matrix.columns.largest());
    }
  }
};

/// The grids of a call's kernels, and the workspace between them.
template <class T>
struct Plan {
  int limit = 0;            // blocks
  size_t shared_limit = 0;  // bytes of a block
  Workspace workspace{};
  size_t bytes = 0;

  cudaError_t make(const Parameters& list, const Kronecker& kronecker, double* base) {
    const Sizes sizes(kronecker);
    ADAQN_CUDA_TRY(max_blocks(&limit));
    ADAQN_CUDA_TRY(max_shared_bytes(&shared_limit));
    Carver carver(reinterpret_cast<unsigned char*>(base));
    workspace.partials = {
        carver.take<double>((kCounts + 1) * total_blocks<T, kWidth<T>>(list, limit)), 0, 0};
    workspace.before = carver.take<Snapshot>(1);
    workspace.orders = carver.take<int32_t>(sizes.orders);
    Carver of_factors(nullptr), of_tiles(nullptr);
    BasisMemory<T>(of_factors, sizes.longest_side);
    TileMemory<T>(of_tiles, sizes.largest_tile);
    bytes = std::max(place(carver, of_factors.bytes(), sizes.factors, &workspace.of_factors),
                     place(carver, of_tiles.bytes(), sizes.tiles, &workspace.of_tiles));
    return cudaSuccess;
  }

  Shape shape(int64_t items, const Scratch& scratch) const {
    const size_t shared = KroneckerMemory<T>(nullptr).bytes() + (scratch.data ? 0 : scratch.bytes);
    return {dim3(unsigned(std::clamp<int64_t>(items, 1, limit))), kThreads<T>, shared};
  }

 private:
  /// Scratch for `items` blocks, at most: in shared memory where it fits, else behind `carver`.
  /// The bytes of workspace with it.
  size_t place(Carver carver, size_t size, int64_t items, Scratch* scratch) const {
    scratch->bytes = size;
    if (KroneckerMemory<T>(nullptr).bytes() + size <= shared_limit) return carver.bytes();
    scratch->data = carver.take<unsigned char>(int64_t(size) * std::min<int64_t>(items, limit));
    return carver.bytes();
  }
};

}  // namespace adaqn::cuda
