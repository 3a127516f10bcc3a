// The threads of a launch, one fiber each: see cuda_runtime.h.

#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Of the fiber that runs now.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace emulation {

// The simulated device; tests change it.
inline int multiprocessors = 2;
inline int blocks_per_multiprocessor = 2;
inline int shared_bytes = 227 << 10;  // that a block can be granted
inline bool reverse_order = false;    // of the threads between two barriers, and of the blocks
inline long launches = 0;

/// A place in the source.
struct Place {
  const char* file;
  int line;
};

/// Barriers there are passed over, which tests do to see that somebody notices.
inline std::string omitted_file;
inline int omitted_line = 0;

/// Runs `body` in every thread of a grid.
void launch(dim3 grid, dim3 threads, size_t shared_bytes, bool cooperative,
            std::function<void()> body);

// For the threads of a launch.
unsigned char* shared_memory();
void wait_for_block(const Place& place);
void wait_for_grid(const Place& place);
/// What the lane `source` of the warp has called it with.  All lanes wait for each other, which
/// orders no memory.
uint64_t exchange(uint64_t bits, unsigned source);

}  // namespace emulation
