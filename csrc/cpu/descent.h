// A step without pairs: what it makes of a gradient, one block at a time.
#pragma once

#include <vector>

#include "averages.h"
#include "gradient.h"
#include "rates.h"

namespace adaqn::cpu {

/// An accepted step, with flags as measured and counters as they are before it is counted.
template <class T>
struct Descent {
  const Scattered& params;
  const Gradient& gradient;
  const Averages& averages;
  const std::vector<Rates>& rates;
  LookAhead look;
  T clip;
  T correction;

  Descent(const Scattered& params_, const Gradient& gradient_, const Averages& averages_,
          const std::vector<Rates>& rates_, const double* flags, const int64_t* counters)
      : params(params_),
        gradient(gradient_),
        averages(averages_),
        rates(rates_),
        look(counters, averages_.beta),
        clip(static_cast<T>(clip_factor(flags, gradient_.max_norm))),
        correction(
            static_cast<T>(bias_correction(counters, averages_.keep, averages_.correct_bias))) {}

  /// Momentum takes in g; q is what is descended along.
  void form_q(const T* g, int64_t at, int64_t n, T* q) const {
    if (averages.momentum != nullptr) {
      blend(averages, look, g, at, n, q);
    } else {
      std::copy_n(g, n, q);
    }
  }

  /// A block of at most kBlock elements; without an accumulator along q itself.
  void move_along_diagonal(int64_t at, int64_t n) const {
    T g[kBlock], p[kBlock], w[kBlock];
    load_gradient(gradient, clip, at, n, g);
    form_q(g, at, n, p);
    if (averages.accumulator != nullptr) scale_by_diagonal(averages, correction, g, p, at, n, p);
    params.load(at, n, w);
    descend(rates, 1, at, n, p, w);
    params.store(at, n, w);
  }
};

}  // namespace adaqn::cpu
