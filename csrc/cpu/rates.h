// The step along a direction, with rates that differ from group to group.
#pragma once

#include <cstdint>
#include <vector>

#include "runs.h"

namespace adaqn::cpu {

/// The rates of elements up to `end`, from the end of the run before.
struct Rates {
  int64_t end;
  double lr;
  double weight_decay;
};

/// w = (1 - lr weight_decay) w - lr factor p, element by element.
template <class T>
struct Advance {
  T lr, shrink;

  Advance(const Rates& rates, double factor)
      : lr(static_cast<T>(rates.lr * factor)),
        shrink(static_cast<T>(1 - rates.lr * rates.weight_decay)) {}

  void move(T p, T& w) const { w = shrink * w - lr * p; }
};

/// Elements begin..begin+n go along p.
template <class T>
inline void descend(const std::vector<Rates>& rates, double factor, int64_t begin, int64_t n,
                    const T* p, T* w) {
  for_runs(rates, begin, n, [&](const Rates& own, int64_t first, int64_t last) {
    const Advance<T> advance(own, factor);
    for (int64_t k = first; k < last; ++k) advance.move(p[k], w[k]);
  });
}

}  // namespace adaqn::cpu
