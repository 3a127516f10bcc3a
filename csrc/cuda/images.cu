// z_i = y_i.r of all pairs, where r is a vector in memory.
#include "load.cuh"
#include "products.cuh"

namespace adaqn::cuda {
namespace {

template <class T, class H>
ADAQN_PASS_KERNEL images_kernel(const __grid_constant__ State state, const T* vector, bool aligned,
                                Gate gate, double* partials) {
  if (!gate.open()) return;
  const Rows<H> y = stored_rows<H>(state.y_ring, PairRing(state.counters, state.slots));
  products<1, T>(
      y, state.numel, aligned, Order::backward,
      [&](const auto& at, auto& x) { load(vector, at, x[0]); }, partials);
}

/// `blocks` of the launch before.
__global__ void finish_products_kernel(const __grid_constant__ State state, Gate gate, int blocks,
                                       const double* partials) {
  if (!gate.open()) return;
  const PairRing ring(state.counters, state.slots);
  visit_totals(
      partials, ring.pairs, Division(ring.pairs, blocks).slices,
      [&](int64_t age, double z) { state.images[ring.slot(int(age))] = finite_or_zero(z); });
  for (int age = ring.pairs + int(threadIdx.x); age < ring.slots; age += int(blockDim.x)) {
    state.images[ring.slot(age)] = 0;
  }
}

}  // namespace

cudaError_t enqueue_images(const State& state, const void* vector, bool aligned, const Gate& gate,
                           const Queue& queue) {
  int limit = 0, blocks = 0;
  ADAQN_CUDA_TRY(max_blocks(&limit));
  ADAQN_CUDA_TRY(with_types(state.type, state.pair_type, [&](auto types) {
    using T = typename decltype(types)::T;
    using H = typename decltype(types)::H;
    blocks = product_blocks<T, H>(state, limit);
    const Shape shape{dim3(unsigned(blocks)), kThreads<T>, kProductBytes<T, 1>};
    return launch(images_kernel<T, H>, shape, queue.stream, state, static_cast<const T*>(vector),
                  aligned, gate, queue.workspace);
  }));
  return launch(finish_products_kernel, Shape{dim3(1), 256, 0}, queue.stream, state, gate, blocks,
                static_cast<const double*>(queue.workspace));
}

cudaError_t direction_images(const State& state, const Queue& queue) {
  const Gate gate{nullptr, state.projections + state.slots, state.counters};
  return enqueue_images(state, state.direction, is_aligned(state), gate, queue);
}

cudaError_t load_images(const Kinds& kinds) {
  return with_types(kinds.vectors, kinds.pairs, [&](auto types) {
    using T = typename decltype(types)::T;
    using H = typename decltype(types)::H;
    return load(images_kernel<T, H>, finish_products_kernel);
  });
}

}  // namespace adaqn::cuda
