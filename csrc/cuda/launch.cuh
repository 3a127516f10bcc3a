// From an operation's arguments to kernel launches: types, grids, segment tables.

#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <set>
#include <utility>

#include "reduce.cuh"
#include "segments.cuh"
#include "slices.cuh"

namespace adaqn::cuda {

#define ADAQN_CUDA_TRY(expression)                                            \
  do {                                                                        \
    if (cudaError_t error = (expression); error != cudaSuccess) return error; \
  } while (false)

/// Blocks that share a multiprocessor; kernels keep their registers below what that allows.
constexpr int kBlocksPerMultiprocessor = 2;

/// A kernel that passes over vectors of T.
#define ADAQN_PASS_KERNEL __global__ void __launch_bounds__(kThreads<T>, kBlocksPerMultiprocessor)

/// Up to this many elements a step is one cooperative launch; above, several weigh nothing.
constexpr int64_t kFusedElements = int64_t(1) << 24;

// ------------------------------------------------------------------ types

/// T: vectors and arithmetic; H: rows of a ring.
template <class T_, class H_>
struct Types {
  using T = T_;
  using H = H_;
};

/// Calls function(row) with a value of the type of a ring's rows, beside vectors of T.
template <class T, class Function>
cudaError_t with_row_type(Type rows, Function function) {
  if (rows == Type::bf16) return function(__nv_bfloat16{});
  const Type own = sizeof(T) == 8 ? Type::f64 : Type::f32;
  return rows == own ? function(T{}) : cudaErrorInvalidValue;
}

template <class Function>
cudaError_t with_types(Type vectors, Type rows, Function function) {
  if (vectors == Type::f32) {
    return with_row_type<float>(rows,
                                [&](auto row) { return function(Types<float, decltype(row)>{}); });
  }
  if (vectors == Type::f64) {
    return with_row_type<double>(
        rows, [&](auto row) { return function(Types<double, decltype(row)>{}); });
  }
  return cudaErrorInvalidValue;
}

// ------------------------------------------------------------------ launches

struct Shape {
  dim3 blocks;
  int threads;
  size_t shared_bytes;
  bool cooperative = false;
};

/// By which the CUDA runtime knows a kernel.
template <class Kernel>
const void* address_of(Kernel* kernel) {
  return reinterpret_cast<const void*>(kernel);
}

/// The most shared memory that a block can be granted.
inline cudaError_t max_shared_bytes(size_t* bytes) {
  int device = 0, most = 0;
  ADAQN_CUDA_TRY(cudaGetDevice(&device));
  ADAQN_CUDA_TRY(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  *bytes = size_t(most);
  return cudaSuccess;
}

/// Lets a kernel have all shared memory of the device, the first time that it needs more than it is
/// granted unasked: the driver need not be asked at every launch, whatever the sizes are.
inline cudaError_t grant_shared_memory(const void* kernel, const Shape& shape) {
  constexpr size_t kGrantedBytes = 48 << 10;
  if (shape.shared_bytes <= kGrantedBytes) return cudaSuccess;
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> granted;  // by device
  int device = 0;
  ADAQN_CUDA_TRY(cudaGetDevice(&device));
  const std::lock_guard<std::mutex> lock(mutex);
  if (granted.count({kernel, device})) return cudaSuccess;
  size_t most = 0;
  ADAQN_CUDA_TRY(max_shared_bytes(&most));
  ADAQN_CUDA_TRY(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(most)));
  granted.insert({kernel, device});
  return cudaSuccess;
}

/// The kernel's parameters convert from `arguments` as in a call.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const Shape& shape, cudaStream_t stream,
                   const Arguments&... arguments) {
  ADAQN_CUDA_TRY(grant_shared_memory(address_of(kernel), shape));
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = shape.blocks;
  config.blockDim = dim3(unsigned(shape.threads));
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = shape.cooperative;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

/// The most blocks of a grid: what runs at once.  The order of summation depends on it, and so the
/// last bits of a result on the device.
inline cudaError_t max_blocks(int* blocks) {
  int device = 0, multiprocessors = 0;
  ADAQN_CUDA_TRY(cudaGetDevice(&device));
  ADAQN_CUDA_TRY(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  *blocks = multiprocessors * kBlocksPerMultiprocessor;
  return cudaSuccess;
}

/// Whether all blocks of a grid can run at the same time, as grid barriers need.
template <class Kernel>
cudaError_t runs_at_once(bool* result, Kernel* kernel, const Shape& shape) {
  int device = 0, multiprocessors = 0, cooperative = 0, blocks = 0;
  ADAQN_CUDA_TRY(cudaGetDevice(&device));
  ADAQN_CUDA_TRY(cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device));
  ADAQN_CUDA_TRY(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  ADAQN_CUDA_TRY(grant_shared_memory(address_of(kernel), shape));
  ADAQN_CUDA_TRY(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, shape.threads,
                                                               shape.shared_bytes));
  *result = cooperative && int64_t(shape.blocks.x) <= int64_t(blocks) * multiprocessors;
  return cudaSuccess;
}

/// Launches a kernel with grid barriers, if all its blocks can run at the same time: on a share of
/// a device the runtime may say that they can, and refuse them then.
template <class Kernel, class... Arguments>
cudaError_t launch_at_once(bool* done, Kernel* kernel, Shape shape, cudaStream_t stream,
                           const Arguments&... arguments) {
  ADAQN_CUDA_TRY(runs_at_once(done, kernel, shape));
  if (!*done) return cudaSuccess;
  shape.cooperative = true;
  const cudaError_t error = launch(kernel, shape, stream, arguments...);
  if (error != cudaErrorCooperativeLaunchTooLarge) return error;
  cudaGetLastError();  // forget it: the caller has another way
  *done = false;
  return cudaSuccess;
}

/// Blocks for [first, end): enough that each thread has a pack, but no more than `limit`.
template <int W, int Threads>
int blocks_for(int64_t first, int64_t end, int limit) {
  const int64_t packs = (end + W - 1) / W - first / W;
  return int(std::clamp<int64_t>((packs + Threads - 1) / Threads, 1, limit));
}

// ------------------------------------------------------------------ alignment

inline bool is_aligned(const Ring& ring, Type type) {
  return reinterpret_cast<uintptr_t>(ring.data) % 16 == 0 &&
         (ring.stride * bytes_of(type)) % 16 == 0;
}

/// Whether every flat array of the state begins at a 16-byte boundary, rows included.
inline bool is_aligned(const State& s) {
  for (const void* p : {s.accumulator, s.momentum, s.iterate_sum, s.anchor, s.direction, s.image}) {
    if (reinterpret_cast<uintptr_t>(p) % 16 != 0) return false;
  }
  return is_aligned(s.s_ring, s.pair_type) && is_aligned(s.y_ring, s.pair_type) &&
         is_aligned(s.fisher, s.fisher_type);
}

// ------------------------------------------------------------------ segment tables

/// Tensors [tensor, next_tensor) of the list, which one table holds.
struct TableRange {
  int64_t tensor = 0, next_tensor = 0;
  int64_t flat = 0, next_flat = 0;
  int32_t first_group = 0;
  int32_t kind = 0;  // of all their averages
};

/// The range after `last`; empty tensors take no place in a table.
inline TableRange next_range(const Parameters& list, const TableRange& last) {
  TableRange range{last.next_tensor, last.next_tensor, last.next_flat, last.next_flat, -1};
  for (int64_t held = 0; range.next_tensor < list.count; ++range.next_tensor) {
    const Tensor& t = list.tensors[range.next_tensor];
    if (t.numel == 0) continue;
    if (range.first_group < 0) range.first_group = t.group, range.kind = t.kind;
    const bool fits = held < kLargeTable && t.group - range.first_group < kTableGroups;
    if (!fits || t.kind != range.kind) break;
    range.next_flat += t.numel;
    ++held;
  }
  return range;
}

template <int Capacity>
void fill_table(Segments<Capacity>& table, const Parameters& list, const TableRange& range,
                bool aligned) {
  int n = 0;
  int64_t flat = range.flat;
  for (int64_t k = range.tensor; k < range.next_tensor; ++k) {
    const Tensor& t = list.tensors[k];
    if (t.numel == 0) continue;
    table.param[n] = t.param;
    table.grad[n] = t.grad;
    table.param_type[n] = t.param_type;
    table.grad_type[n] = t.grad_type;
    table.group[n] = uint8_t(t.group - range.first_group);
    table.begin[n++] = flat;
    flat += t.numel;
  }
  table.begin[n] = flat;
  table.count = n;
  table.aligned = aligned;
}

/// Calls function(table, range) for tables that together hold all parameters, in order.
template <class Function>
cudaError_t for_each_table(const Parameters& list, const State& state, Function function) {
  const bool aligned = is_aligned(state);
  TableRange range;
  while (range.next_tensor < list.count) {
    range = next_range(list, range);
    if (range.next_flat == range.flat) continue;
    if (range.next_tensor - range.tensor <= kSmallTable) {
      Segments<kSmallTable> table;
      fill_table(table, list, range, aligned);
      ADAQN_CUDA_TRY(function(table, range));
    } else {
      Segments<kLargeTable> table;
      fill_table(table, list, range, aligned);
      ADAQN_CUDA_TRY(function(table, range));
    }
  }
  return cudaSuccess;
}

/// Blocks of all launches over the parameters, one launch per table.
template <class T, int W>
int64_t total_blocks(const Parameters& list, int limit) {
  int64_t blocks = 0;
  TableRange range;
  while (range.next_tensor < list.count) {
    range = next_range(list, range);
    if (range.next_flat == range.flat) continue;
    blocks += blocks_for<W, kThreads<T>>(range.flat, range.next_flat, limit);
  }
  return blocks;
}

/// Calls enqueue(table, range, shape) for every table, with `partials` at the launch's columns.
template <class T, int W, class Enqueue>
cudaError_t for_each_launch(const Parameters& list, const State& state, size_t shared_bytes,
                            Partials& partials, Enqueue enqueue) {
  int limit = 0;
  ADAQN_CUDA_TRY(max_blocks(&limit));
  partials.columns = total_blocks<T, W>(list, limit);
  partials.first = 0;
  return for_each_table(list, state, [&](const auto& table, const TableRange& range) {
    const int blocks = blocks_for<W, kThreads<T>>(range.flat, range.next_flat, limit);
    ADAQN_CUDA_TRY(enqueue(table, range, Shape{dim3(unsigned(blocks)), kThreads<T>, shared_bytes}));
    partials.first += blocks;
    return cudaSuccess;
  });
}

/// Whether a step over these parameters is worth one launch, and one table holds them all.
inline bool is_fusible(const Parameters& list, const State& state) {
  const bool one_table = next_range(list, {}).next_tensor == list.count;
  return one_table && state.numel > 0 && state.numel <= kFusedElements;
}

/// The grid of a pass over the whole flat vector, and its partial sums.
template <class T, int W>
cudaError_t flat_launch(const State& state, const Queue& queue, Shape* shape, Partials* partials) {
  int limit = 0;
  ADAQN_CUDA_TRY(max_blocks(&limit));
  const int blocks = blocks_for<W, kThreads<T>>(0, state.numel, limit);
  *shape = {dim3(unsigned(blocks)), kThreads<T>, 0};
  *partials = {queue.workspace, blocks, 0};
  return cudaSuccess;
}

/// Calls enqueue(T{}, table, shape) for every table: kernels that reduce nothing.
template <class Enqueue>
cudaError_t for_each_simple_launch(const Parameters& list, const State& state, Enqueue enqueue) {
  return with_types(state.type, state.type, [&](auto types) {
    using T = typename decltype(types)::T;
    Partials unused{};
    return for_each_launch<T, kWidth<T>>(
        list, state, 0, unused, [&](const auto& table, const TableRange&, const Shape& shape) {
          return enqueue(T{}, table, shape);
        });
  });
}

}  // namespace adaqn::cuda
