// Products of the stored y with a vector, into `images`: two launches, for any number of pairs.
#pragma once

#include "../common/acceptance.h"
#include "launch.cuh"
#include "sweep.cuh"

namespace adaqn::cuda {

/// Whether an operation does anything, as the device knows.
struct Gate {
  const double* words;      // null: as the latest step's flags say
  const double* flags;      // null: as the search's words say
  const int64_t* counters;  // with the flags

  __device__ __forceinline__ bool open() const {
    return words ? !turns(words, turn::refuse) : step_is_accepted(flags, counters);
  }
};

/// Blocks for products of all rows of the pair rings.
template <class T, class H>
int product_blocks(const State& state, int limit) {
  const int64_t tiles = std::max((state.slots + kTileRows - 1) / kTileRows, 1);
  const int64_t blocks = tiles * blocks_for<kWidth<H>, kThreads<T>>(0, state.numel, limit);
  return int(std::min<int64_t>(blocks, limit));
}

/// images[slot] = y_i.vector of the stored pairs, zero elsewhere, if the gate is open.
cudaError_t enqueue_images(const State& state, const void* vector, bool aligned, const Gate& gate,
                           const Queue& queue);

}  // namespace adaqn::cuda
