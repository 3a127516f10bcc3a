// Shared memory, and how a block divides it.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace adaqn::cuda {

/// Hands out consecutive parts of a block's memory.
class Carver {
 public:
  __host__ __device__ explicit Carver(unsigned char* base) : at_(base), base_(base) {}

  template <class U>
  __host__ __device__ U* take(int64_t count) {
    U* part = reinterpret_cast<U*>(at_);
    at_ += (count * sizeof(U) + 15) / 16 * 16;
    return part;
  }
  __host__ __device__ unsigned char* position() const { return at_; }
  __host__ __device__ size_t bytes() const { return size_t(at_ - base_); }

 private:
  unsigned char *at_, *base_;
};

/// A block's dynamic shared memory.
__device__ __forceinline__ unsigned char* shared_memory() {
#ifdef ADAQN_DYNAMIC_SHARED  // the host emulation brings its own
  return ADAQN_DYNAMIC_SHARED();
#else
  extern __shared__ uint4 memory[];
  return reinterpret_cast<unsigned char*>(memory);
#endif
}

}  // namespace adaqn::cuda
