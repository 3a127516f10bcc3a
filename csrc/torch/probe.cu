// Whether the kernels of this library run on a device.  Every source has the same images.

#include <cuda_runtime.h>

namespace {

__global__ void probe_kernel() {}

}  // namespace

/// Null, or what the CUDA runtime says against it.  The device stays current in this runtime, as
/// after an operation: torch's guard around the call brings back the one before.
extern "C" __attribute__((visibility("default"))) const char* adaqn_cuda_probe(int device) {
  cudaFuncAttributes attributes;
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, probe_kernel);
  cudaGetLastError();  // forget it: the caller is told
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
