// The gradient to descend and its averages: what pass 2 and the diagonal step share.
#pragma once

#include "control.cuh"
#include "segments.cuh"

namespace adaqn::cuda {

/// What turns a gradient as given into the one to descend, before it is clipped.
__device__ __forceinline__ double scale_of(const Scaling& scaling) {
  const double scale = scaling.grad_scale ? 1 / double(*scaling.grad_scale) : 1.0;
  return scaling.maximize ? -scale : scale;
}

/// The gradient to descend.
template <class T, class At, int W, int Capacity>
__device__ __forceinline__ void load_gradient(const Cursor<Capacity>& cursor, const At& at, T scale,
                                              T (&g)[W]) {
  load_grad(cursor, at, g);
#pragma unroll
  for (int j = 0; j < W; ++j) {
    g[j] *= scale;
  }
}

/// m and v at packs, as far as there are any; loaded early, to be in flight beside the gradient.
template <class T, int W>
struct AveragesAt {
  T m[W], v[W];

  template <class At>
  __device__ __forceinline__ void load(const State& state, const At& at) {
    if (state.momentum) cuda::load(static_cast<const T*>(state.momentum), at, m);
    if (state.accumulator) cuda::load(static_cast<const T*>(state.accumulator), at, v);
  }

  /// g enters m and v, in memory; q and the diagonal of D are what they make.  Where nothing
  /// `moves`, g is zero, as is q, and m and v are not touched.
  template <class At>
  __device__ __forceinline__ void enter(const State& state, const AverageFactors<T>& factors,
                                        const At& at, bool moves, const T (&g)[W], T (&q)[W],
                                        T (&diagonal)[W]) {
#pragma unroll
    for (int j = 0; j < W; ++j) {
      q[j] = g[j];
      diagonal[j] = factors.scalar;
    }
    if (state.momentum && moves) {
#pragma unroll
      for (int j = 0; j < W; ++j) {
        q[j] = factors.of_old * m[j] + factors.of_gradient * g[j];
        m[j] = factors.beta * m[j] + factors.rest * g[j];
      }
      store(static_cast<T*>(state.momentum), at, m);
    }
    if (!state.accumulator) return;
    if (moves) {
#pragma unroll
      for (int j = 0; j < W; ++j) v[j] = factors.keep * v[j] + factors.add * g[j] * g[j];
      store(static_cast<T*>(state.accumulator), at, v);
    }
#pragma unroll
    for (int j = 0; j < W; ++j) diagonal[j] = rsqrt(factors.correction * v[j] + factors.eps);
  }
};

}  // namespace adaqn::cuda
