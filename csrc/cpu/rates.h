// The step along a direction, with rates that differ from group to group.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

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

/// Calls body(rates, first, last) for every part first..last of 0..n, elements from `begin` on,
/// that has the same rates.
template <class Body>
inline void for_rates(const std::vector<Rates>& rates, int64_t begin, int64_t n, const Body& body) {
  auto run = std::upper_bound(rates.begin(), rates.end(), begin,
                              [](int64_t at, const Rates& r) { return at < r.end; });
  for (int64_t first = 0; first < n; ++run) {
    const int64_t last = std::min(n, run->end - begin);
    body(*run, first, last);
    first = last;
  }
}

/// Elements begin..begin+n go along p.
template <class T>
inline void descend(const std::vector<Rates>& rates, double factor, int64_t begin, int64_t n,
                    const T* p, T* w) {
  for_rates(rates, begin, n, [&](const Rates& own, int64_t first, int64_t last) {
    const Advance<T> advance(own, factor);
    for (int64_t k = first; k < last; ++k) advance.move(p[k], w[k]);
  });
}

}  // namespace adaqn::cpu
