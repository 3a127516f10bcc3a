// CUDA on the host, for tests: the kernels of csrc/cuda compile against this header with a plain
// C++ compiler and run on the CPU.
//
// Every CUDA thread is a fiber.  The fibers of a block take turns at barriers and shuffles; blocks
// run one after the other, or all at once in a cooperative launch.  Shared memory is dynamic only:
// it starts out as NaN, and writing past its end is an error, as is a barrier that not all threads
// reach.  What this finds: wrong indices, tails, missing or divergent barriers.  What it cannot
// find: data races between warps that run in lockstep here, and anything about speed.

#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

// Of the fiber that runs now.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace emulation {

constexpr size_t kStackBytes = 64 << 10;
constexpr size_t kCanaryBytes = 16 << 10;
constexpr unsigned char kFill = 0xff;  // NaN in every floating-point format

// The simulated device; tests change it.
inline int multiprocessors = 2;
inline int blocks_per_multiprocessor = 2;
inline int shared_bytes = 227 << 10;  // that a block can be granted
inline bool reverse_order = false;    // of the threads between two barriers, and of the blocks
inline long launches = 0;
inline int cooperative_limit = 0;  // blocks that a cooperative launch is refused beyond; 0: none
inline int device = 0;             // the current one

// What the runtime has been asked for.
inline long device_changes = 0, grants = 0, unloaded_launches = 0;
inline std::map<const void*, int> granted;  // bytes of shared memory, by kernel
inline std::set<const void*> loaded;        // kernels

struct Barrier {
  const char* name;
  unsigned expected = 0, arrived = 0, generation = 0;
};

struct Warp {
  Barrier barrier{"warp"};
  uint64_t lane[32];
};

struct Block {
  uint3 index;
  Barrier barrier{"block"};
  std::vector<Warp> warps;
  std::vector<unsigned char> shared;
};

struct Fiber {
  Block* block;
  uint3 thread;
  std::unique_ptr<char[]> stack;
  ucontext_t start;
  jmp_buf state;
  bool started = false, done = false;
  Barrier* waits_for = nullptr;
  unsigned generation = 0;
};

inline Fiber* current = nullptr;
inline jmp_buf scheduler;
inline Barrier* grid_barrier = nullptr;
inline std::function<void()> body;
inline std::vector<std::unique_ptr<char[]>> spare_stacks;

inline unsigned flat_thread() { return threadIdx.x; }
inline Warp& warp() { return current->block->warps[flat_thread() / 32]; }

inline void run_fiber() {
  body();
  current->done = true;
  _longjmp(scheduler, 1);
}

// Returns when the fiber waits at a barrier or has left the kernel.
inline void resume(Fiber& fiber) {
  current = &fiber;
  threadIdx = fiber.thread;
  blockIdx = fiber.block->index;
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.state, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

inline void wait(Barrier& barrier) {
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  current->waits_for = &barrier;
  current->generation = barrier.generation;
  if (!_setjmp(current->state)) _longjmp(scheduler, 1);
  current->waits_for = nullptr;
}

inline void add_fibers(std::vector<Fiber>& fibers, Block& block) {
  for (unsigned t = 0; t < blockDim.x; ++t) {
    Fiber& fiber = fibers.emplace_back();
    fiber.block = &block;
    fiber.thread = {t, 0, 0};
    if (spare_stacks.empty()) spare_stacks.emplace_back(new char[kStackBytes]);
    fiber.stack = std::move(spare_stacks.back());
    spare_stacks.pop_back();
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStackBytes;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, run_fiber, 0);
  }
}

/// Whether any of them could move.
inline bool resume_all(Fiber* begin, Fiber* end) {
  bool moved = false;
  for (Fiber* fiber = begin; fiber != end; ++fiber) {
    const Barrier* barrier = fiber->waits_for;
    if (fiber->done || (barrier && barrier->generation == fiber->generation)) continue;
    resume(*fiber);
    moved = true;
  }
  return moved;
}

inline void run_fibers(std::vector<Fiber>& fibers) {
  if (reverse_order) std::reverse(fibers.begin(), fibers.end());
  // Each block goes as far as it can before the next one moves, so that blocks drift apart.
  for (bool progress = true; progress;) {
    progress = false;
    for (size_t first = 0; first < fibers.size(); first += blockDim.x) {
      while (resume_all(&fibers[first], &fibers[first] + blockDim.x)) progress = true;
    }
  }
  size_t waiting = 0, left = 0;
  std::string where;
  for (Fiber& fiber : fibers) {
    ++(fiber.done ? left : waiting);
    if (!fiber.done) where = fiber.waits_for->name;
    spare_stacks.push_back(std::move(fiber.stack));
  }
  if (waiting)
    throw std::runtime_error("deadlock: " + std::to_string(waiting) + " threads wait at a " +
                             where + " barrier, " + std::to_string(left) + " have left the kernel");
}

inline Block make_block(unsigned index, size_t shared_bytes) {
  Block block;
  block.index = {index % gridDim.x, index / gridDim.x, 0};
  block.barrier.expected = blockDim.x;
  block.warps.resize((blockDim.x + 31) / 32);
  for (size_t w = 0; w < block.warps.size(); ++w)
    block.warps[w].barrier.expected = std::min<size_t>(32, blockDim.x - 32 * w);
  block.shared.assign(shared_bytes + kCanaryBytes, kFill);
  return block;
}

inline void check_shared(const Block& block) {
  for (size_t i = block.shared.size() - kCanaryBytes; i < block.shared.size(); ++i)
    if (block.shared[i] != kFill) throw std::runtime_error("write past the end of shared memory");
}

inline void launch(dim3 grid, dim3 threads, size_t shared_bytes, bool cooperative) {
  ++launches;
  gridDim = grid;
  blockDim = threads;
  std::vector<Block> blocks;
  for (unsigned b = 0; b < grid.x * grid.y; ++b) blocks.push_back(make_block(b, shared_bytes));
  if (reverse_order) std::reverse(blocks.begin(), blocks.end());
  Barrier whole_grid{"grid"};
  whole_grid.expected = grid.x * grid.y * threads.x;
  grid_barrier = cooperative ? &whole_grid : nullptr;
  std::vector<Fiber> fibers;
  fibers.reserve(cooperative ? whole_grid.expected : threads.x);
  for (Block& block : blocks) {
    add_fibers(fibers, block);
    if (cooperative) continue;
    run_fibers(fibers);
    fibers.clear();
  }
  if (cooperative) run_fibers(fibers);
  for (Block& block : blocks) check_shared(block);
}

template <class T>
T exchange(T value, unsigned source_lane) {
  static_assert(sizeof(T) <= 8);
  Warp& w = warp();
  std::memcpy(&w.lane[flat_thread() % 32], &value, sizeof(T));
  wait(w.barrier);
  T result;
  std::memcpy(&result, &w.lane[source_lane % 32], sizeof(T));
  wait(w.barrier);
  return result;
}

}  // namespace emulation

#define ADAQN_DYNAMIC_SHARED() (emulation::current->block->shared.data())

inline void __syncthreads() { emulation::wait(emulation::current->block->barrier); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulation::exchange(value, (threadIdx.x % 32) ^ mask);
}

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulation::exchange(value, unsigned(lane));
}

template <class T>
T __ldcs(const T* p) {
  return *p;
}

template <class T>
T rsqrt(T x) {
  return 1 / std::sqrt(x);
}

// ------------------------------------------------------------------ the host's side

enum cudaError_t {
  cudaSuccess,
  cudaErrorInvalidValue,
  cudaErrorInvalidConfiguration,
  cudaErrorCooperativeLaunchTooLarge,
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrCooperativeLaunch,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaFuncAttributes {};
enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative };

using cudaStream_t = struct EmulatedStream*;

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int cooperative;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline cudaError_t cudaGetDevice(int* device) {
  *device = emulation::device;
  return cudaSuccess;
}

inline cudaError_t cudaSetDevice(int device) {
  ++emulation::device_changes;
  emulation::device = device;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount            ? emulation::multiprocessors
           : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? emulation::shared_bytes
                                                                  : 1;
  return cudaSuccess;
}

inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  ++emulation::grants;
  emulation::granted[kernel] = bytes;
  return cudaSuccess;
}

inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void* kernel) {
  emulation::loaded.insert(kernel);
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int, size_t) {
  *blocks = emulation::blocks_per_multiprocessor;
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  if (!config->gridDim.x || !config->gridDim.y) return cudaErrorInvalidConfiguration;
  const void* const address = reinterpret_cast<const void*>(kernel);
  const int granted = std::max(emulation::granted[address], 48 << 10);
  if (config->dynamicSmemBytes > size_t(std::min(granted, emulation::shared_bytes))) {
    return cudaErrorInvalidConfiguration;
  }
  const bool cooperative = config->numAttrs && config->attrs->val.cooperative;
  if (cooperative && emulation::cooperative_limit &&
      config->gridDim.x > unsigned(emulation::cooperative_limit)) {
    return cudaErrorCooperativeLaunchTooLarge;
  }
  emulation::unloaded_launches += 1 - long(emulation::loaded.count(address));
  std::tuple<std::decay_t<Parameters>...> values(arguments...);
  emulation::body = [&] { std::apply(kernel, values); };
  emulation::launch(config->gridDim, config->blockDim, config->dynamicSmemBytes, cooperative);
  return cudaSuccess;
}
