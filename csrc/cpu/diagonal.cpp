#include "diagonal.h"

#include "../common/acceptance.h"
#include "direction.h"
#include "dispatch.h"

namespace adaqn::cpu {
namespace {

/// Elements first..last, with m and with v if they are there.  One loop for all that is done to
/// them: the next elements come from memory while the square roots of these are taken.
template <class T, class HasM, class HasV>
inline void move_elements(const Momentum<T> momentum, const Diagonal<T> diagonal,
                          const Descent<T> descent, int64_t first, int64_t last, const T* g, T* m,
                          T* v, T* w, HasM, HasV) {
#pragma omp simd
  for (int64_t k = first; k < last; ++k) {
    T p = g[k];
    if constexpr (HasM::value) p = momentum.look_ahead(g[k], m[k]);
    if constexpr (HasV::value) p /= diagonal.root(g[k], v[k]);
    descent.move(p, w[k]);
  }
}

/// The part of an array of the state from element `at` on; null if there is none.
template <class T>
inline T* part_of(void* array, int64_t at) {
  return array == nullptr ? nullptr : static_cast<T*>(array) + at;
}

template <class T>
void move(ParallelFor parallel_for, const DiagonalStep& a, T) {
  const Momentum<T> momentum(LookAhead(a.counters, a.averages.beta));
  const T clip = static_cast<T>(clip_factor(a.flags, a.gradient.max_norm));
  const Diagonal<T> diagonal(a.averages, static_cast<T>(bias_correction(a.counters, a.averages.keep,
                                                                        a.averages.correct_bias)));
  const auto chunk = [&](int64_t, int64_t begin, int64_t end) {
    for_blocks(a.gradient.tensors, begin, end, [&](int64_t at, int64_t n, bool present) {
      if (!present) return;
      T gradient_block[kBlock], block[kBlock];
      const T* g = view_gradient(a.gradient, clip, at, n, gradient_block);
      T* m = part_of<T>(a.averages.momentum, at);
      T* v = part_of<T>(a.averages.accumulator, at);
      T* w = a.params.view(at, n, block);
      for_rates(a.rates, at, n, [&](const Rates& rates, int64_t first, int64_t last) {
        const Descent<T> descent(rates, 1);
        with_flag(m != nullptr, [&](auto has_m) {
          with_flag(v != nullptr, [&](auto has_v) {
            move_elements(momentum, diagonal, descent, first, last, g, m, v, w, has_m, has_v);
          });
        });
      });
      if (w == block) a.params.store(at, n, w);
    });
  };
  for_chunks(parallel_for, a.params.size(), Order::backward, chunk);
}

}  // namespace

void diagonal_step(ParallelFor parallel_for, const DiagonalStep& a) {
  const Matrix no_pairs{nullptr, a.dtype, 0, a.params.size(), 0};
  direction_pass1(parallel_for, {a.gradient, a.dtype, no_pairs, a.counters, a.found_inf,
                                 a.averages.beta, nullptr, a.flags});
  const bool accepted = step_is_accepted(a.flags, a.counters);
  if (accepted) with_vector_type(a.dtype, [&](auto t) { move(parallel_for, a, t); });
  count_step(a.counters, a.flags, accepted, 1);
}

}  // namespace adaqn::cpu
