// Which kernels an optimizer needs.
#include "load.cuh"

namespace adaqn::cuda {

cudaError_t load_kernels(const Kinds& kinds, bool has_pairs, bool kronecker) {
  ADAQN_CUDA_TRY(load_strided());
  if (kronecker) ADAQN_CUDA_TRY(load_kronecker(kinds));
  if (!has_pairs) {
    if (kronecker) return cudaSuccess;
    ADAQN_CUDA_TRY(load_direction({kinds.vectors, kinds.vectors, kinds.vectors}));
    return load_diagonal(kinds);
  }
  ADAQN_CUDA_TRY(load_direction(kinds));
  ADAQN_CUDA_TRY(load_images(kinds));
  ADAQN_CUDA_TRY(load_iterate(kinds));
  return load_curvature(kinds);
}

cudaError_t load_search_kernels(const Kinds& kinds, bool kronecker) {
  ADAQN_CUDA_TRY(load_strided());
  if (kronecker) ADAQN_CUDA_TRY(load_kronecker(kinds));
  ADAQN_CUDA_TRY(load_images(kinds));
  return load_secant(kinds);
}

}  // namespace adaqn::cuda
