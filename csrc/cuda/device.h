// The current device of the CUDA runtime that is linked here.
#pragma once

#include <cuda_runtime.h>

namespace adaqn::cuda {

/// Makes it this one, if it is another: setting it costs much more than asking.
inline cudaError_t make_current(int device) {
  int current = 0;
  const cudaError_t error = cudaGetDevice(&current);
  return error == cudaSuccess && current != device ? cudaSetDevice(device) : error;
}

}  // namespace adaqn::cuda
