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

/// w = (1 - lr weight_decay) w - lr factor p for elements begin..begin+n.
template <class T>
inline void descend(const std::vector<Rates>& rates, double factor, int64_t begin, int64_t n,
                    const T* p, T* w) {
  auto run = std::upper_bound(rates.begin(), rates.end(), begin,
                              [](int64_t at, const Rates& r) { return at < r.end; });
  for (int64_t k = 0; k < n; ++run) {
    const int64_t end = std::min(n, run->end - begin);
    const T lr = static_cast<T>(run->lr * factor);
    const T shrink = static_cast<T>(1 - run->lr * run->weight_decay);
    for (; k < end; ++k) w[k] = shrink * w[k] - lr * p[k];
  }
}

}  // namespace adaqn::cpu
