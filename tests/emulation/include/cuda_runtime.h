// CUDA on the host, for tests: the kernels of csrc/cuda compile against this header with a plain
// C++ compiler and run on the CPU.
//
// Every CUDA thread is a fiber (fibers.h).  The fibers of a block take turns at barriers and
// shuffles; blocks run one after the other, or all at once in a cooperative launch.  Shared memory
// is dynamic only: it starts out as NaN, and writing past its end is an error, as is a barrier that
// not all threads reach.  What this finds: wrong indices, tails, missing or divergent barriers.
// Data races show where the kernels are compiled for ThreadSanitizer (order.h): barriers of blocks
// and grids alone order memory, and launches.  Nothing here says anything about speed.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <set>
#include <tuple>
#include <utility>

#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace emulation {

template <class T>
T shuffle(T value, unsigned source_lane) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(bits, source_lane);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace emulation

#define ADAQN_DYNAMIC_SHARED() (emulation::shared_memory())

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulation::wait_for_block({file, line});
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulation::shuffle(value, (threadIdx.x % 32) ^ mask);
}

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulation::shuffle(value, unsigned(lane));
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

namespace emulation {

inline int cooperative_limit = 0;  // blocks that a cooperative launch is refused beyond; 0: none
inline int device = 0;             // the current one

// What the runtime has been asked for.
inline long device_changes = 0, grants = 0, unloaded_launches = 0;
inline std::map<const void*, int> granted;  // bytes of shared memory, by kernel
inline std::set<const void*> loaded;        // kernels

}  // namespace emulation

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
  emulation::launch(config->gridDim, config->blockDim, config->dynamicSmemBytes, cooperative,
                    [&] { std::apply(kernel, values); });
  return cudaSuccess;
}
