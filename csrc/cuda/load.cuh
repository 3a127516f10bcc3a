// Loading of kernels, by the file that holds them.
#pragma once

#include <type_traits>

#include "launch.cuh"

namespace adaqn::cuda {

cudaError_t load_direction(const Kinds& kinds);
cudaError_t load_diagonal(const Kinds& kinds);
cudaError_t load_curvature(const Kinds& kinds);
cudaError_t load_iterate(const Kinds& kinds);
cudaError_t load_images(const Kinds& kinds);
cudaError_t load_kronecker(const Kinds& kinds);
cudaError_t load_secant(const Kinds& kinds);
cudaError_t load_strided();

/// Loads kernels.
template <class... Kernels>
cudaError_t load(Kernels*... kernels) {
  for (const void* kernel : {address_of(kernels)...}) {
    cudaFuncAttributes attributes;
    ADAQN_CUDA_TRY(cudaFuncGetAttributes(&attributes, kernel));
  }
  return cudaSuccess;
}

/// Calls function(c) for the capacities c of a table, which are constants.
template <int Small, int Large, class Function>
cudaError_t for_capacities(Function function) {
  ADAQN_CUDA_TRY(function(std::integral_constant<int, Small>{}));
  return function(std::integral_constant<int, Large>{});
}

}  // namespace adaqn::cuda
