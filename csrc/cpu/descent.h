// A step without pairs: what it makes of a gradient, one block at a time.
#pragma once

#include <vector>

#include "averages.h"
#include "dispatch.h"
#include "gradient.h"
#include "rates.h"

namespace adaqn::cpu {

/// Elements first..last, with m and with v if they are there.  One loop for all that is done to
/// them: the next elements come from memory while the square roots of these are taken.
template <class T, class HasM, class HasV>
inline void move_elements(const Momentum<T> momentum, const Diagonal<T> diagonal,
                          const Advance<T> advance, int64_t first, int64_t last, const T* g, T* m,
                          T* v, T* w, HasM, HasV) {
#pragma omp simd
  for (int64_t k = first; k < last; ++k) {
    T p = g[k];
    if constexpr (HasM::value) p = momentum.look_ahead(g[k], m[k]);
    if constexpr (HasV::value) p /= diagonal.root(g[k], v[k]);
    advance.move(p, w[k]);
  }
}

/// The part of an array of the state from element `at` on; null if there is none.
template <class T>
inline T* part_of(void* array, int64_t at) {
  return array == nullptr ? nullptr : static_cast<T*>(array) + at;
}

/// An accepted step, with flags as measured and counters as they are before it is counted.
template <class T>
struct Descent {
  const Scattered& params;
  const Gradient& gradient;
  const Averages& averages;
  const std::vector<Rates>& rates;
  std::vector<Blend<T>> blends;
  T clip;

  Descent(const Scattered& params_, const Gradient& gradient_, const Averages& averages_,
          const std::vector<Rates>& rates_, const double* flags, const int64_t* counters)
      : params(params_),
        gradient(gradient_),
        averages(averages_),
        rates(rates_),
        blends(blends_of<T>(averages_, counters)),
        clip(static_cast<T>(clip_factor(flags, gradient_.max_norm))) {}

  /// A block of at most kBlock elements; without an accumulator along q itself.
  void move_along_diagonal(int64_t at, int64_t n) const {
    T gradient_block[kBlock], block[kBlock];
    const T* g = view_gradient(gradient, clip, at, n, gradient_block);
    T* m = part_of<T>(averages.momentum, at);
    T* v = part_of<T>(averages.accumulator, at);
    T* w = params.view(at, n, block);
    for_runs(blends, at, n, [&](const Blend<T>& blend, int64_t begin, int64_t end) {
      for_runs(rates, at + begin, end - begin, [&](const Rates& own, int64_t first, int64_t last) {
        const Advance<T> advance(own, 1);
        with_flag(m != nullptr, [&](auto has_m) {
          with_flag(v != nullptr, [&](auto has_v) {
            move_elements(blend.momentum, blend.diagonal, advance, begin + first, begin + last, g,
                          m, v, w, has_m, has_v);
          });
        });
      });
    });
    if (w == block) params.store(at, n, w);
  }
};

}  // namespace adaqn::cpu
