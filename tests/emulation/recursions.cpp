// The recursions of csrc/cuda/recursions.cuh by themselves, for bindings.cpp.
#include "../../csrc/cuda/recursions.cuh"

#include <utility>
#include <vector>

#include "../../csrc/cuda/launch.cuh"

namespace {

using namespace adaqn::cuda;
using Values = std::vector<double>;

/// One after the other, with a and c by age.
__global__ void recursions_kernel(const double* gram, adaqn::PairRing ring, const double* u,
                                  const double* z, double* a, double* c) {
  const PairTriangle triangle(reinterpret_cast<double*>(shared_memory()), ring);
  load_triangle(gram, ring, triangle);
  __syncthreads();
  if (threadIdx.x == 0) solve_by_rows(triangle, ring, u, a);
  __syncthreads();
  for (int i = int(threadIdx.x); i < ring.pairs; i += int(blockDim.x)) c[i] = a[i];
  __syncthreads();
  if (threadIdx.x < 32) solve_by_columns(triangle, ring, z, c);
}

}  // namespace

/// a and c by slot, as the functions of csrc/common/recursion.h leave them.
std::pair<Values, Values> recursions(const Values& gram, const std::vector<int64_t>& counters,
                                     int slots, const Values& u, const Values& z) {
  const adaqn::PairRing ring(counters.data(), slots);
  const size_t words = size_t(slots) * PairTriangle::pitch_of(slots);
  const Shape shape{dim3(1), 64, words * sizeof(double)};
  Values a(size_t(ring.pairs) + PairTriangle::kTerms), c(size_t(ring.pairs));
  launch(recursions_kernel, shape, nullptr, gram.data(), ring, u.data(), z.data(), a.data(),
         c.data());
  Values a_by_slot(slots), c_by_slot(slots);
  for (int age = 0; age < ring.pairs; ++age) {
    a_by_slot[ring.slot(age)] = a[age];
    c_by_slot[ring.slot(age)] = c[age];
  }
  return {a_by_slot, c_by_slot};
}
