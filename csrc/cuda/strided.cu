// Tensors that are not contiguous: all of a list to memory that is, or back, in one launch.
#include "launch.cuh"
#include "load.cuh"

namespace adaqn::cuda {
namespace {

/// What one launch takes; less than 4 KB of arguments.
constexpr int kStridedTensors = 48, kStridedThreads = 256;

struct StridedTable {
  Strided tensors[kStridedTensors];
  int64_t begin[kStridedTensors + 1];
  int count;
};

/// The tensor of element i of all.
__device__ int find_tensor(const StridedTable& table, int64_t i) {
  int low = 0, high = table.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (table.begin[middle] <= i ? low : high) = middle;
  }
  return low;
}

__device__ int64_t offset_of(const Strided& tensor, uint32_t i) {
  int64_t offset = 0;
  for (int d = tensor.dims - 1; d >= 0; --d) {
    offset += int64_t(i % tensor.sizes[d]) * tensor.strides[d];
    i /= tensor.sizes[d];
  }
  return offset;
}

/// U: any type of the size of an element.
template <class U>
__device__ void copy_element(const Strided& tensor, uint32_t i, bool to_dense) {
  U& strided = static_cast<U*>(tensor.strided)[offset_of(tensor, i)];
  U& dense = static_cast<U*>(tensor.dense)[i];
  if (to_dense) {
    dense = strided;
  } else {
    strided = dense;
  }
}

__global__ void __launch_bounds__(kStridedThreads)
    copy_strided_kernel(const __grid_constant__ StridedTable table, bool to_dense) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x, end = table.begin[table.count];
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < end; i += step) {
    const int n = find_tensor(table, i);
    const Strided& tensor = table.tensors[n];
    const uint32_t element = uint32_t(i - table.begin[n]);
    if (tensor.bytes == 2) {
      copy_element<uint16_t>(tensor, element, to_dense);
    } else if (tensor.bytes == 4) {
      copy_element<uint32_t>(tensor, element, to_dense);
    } else {
      copy_element<uint64_t>(tensor, element, to_dense);
    }
  }
}

}  // namespace

cudaError_t copy_strided(const Strided* tensors, int64_t count, bool to_dense,
                         cudaStream_t stream) {
  constexpr int kBlocks = 4;  // beyond those of other kernels: these only wait for memory
  int limit = 0;
  ADAQN_CUDA_TRY(max_blocks(&limit));
  for (int64_t first = 0; first < count; first += kStridedTensors) {
    StridedTable table{};
    table.count = int(std::min<int64_t>(count - first, kStridedTensors));
    for (int n = 0; n < table.count; ++n) {
      table.tensors[n] = tensors[first + n];
      table.begin[n + 1] = table.begin[n] + tensors[first + n].numel();
    }
    const int blocks = blocks_for<1, kStridedThreads>(0, table.begin[table.count], kBlocks * limit);
    const Shape shape{dim3(unsigned(blocks)), kStridedThreads, 0};
    ADAQN_CUDA_TRY(launch(copy_strided_kernel, shape, stream, table, to_dense));
  }
  return cudaSuccess;
}

cudaError_t load_strided() { return load(copy_strided_kernel); }

}  // namespace adaqn::cuda
