// Tensors that are not contiguous: how they lie in memory.
#pragma once

#include <cstdint>

namespace adaqn::cuda {

/// Dimensions that are left once those are merged that lie in memory as one.
constexpr int kStridedDims = 4;

/// A tensor, and memory for its elements in their order.
struct Strided {
  void* strided;
  void* dense;
  int bytes;  // of an element: 2, 4 or 8
  int dims;
  uint32_t sizes[kStridedDims];
  int64_t strides[kStridedDims];  // in elements

  /// Whether it could be described.
  bool set_shape(size_t count, const int64_t* all_sizes, const int64_t* all_strides) {
    constexpr int64_t most = INT32_MAX;
    int64_t numel = 1;
    dims = 0;
    for (size_t d = 0; d < count; ++d) {
      const int64_t size = all_sizes[d], stride = all_strides[d];
      if (size == 1) continue;
      if (size > most / numel) return false;
      numel *= size;
      if (dims > 0 && strides[dims - 1] == stride * size) {
        sizes[dims - 1] *= uint32_t(size);
        strides[dims - 1] = stride;
        continue;
      }
      if (dims == kStridedDims) return false;
      sizes[dims] = uint32_t(size);
      strides[dims++] = stride;
    }
    return true;
  }

  int64_t numel() const {
    int64_t product = 1;
    for (int d = 0; d < dims; ++d) product *= sizes[d];
    return product;
  }
};

}  // namespace adaqn::cuda
