// The rows of a ring that hold a pair, oldest first, and numbers that belong to them.
#pragma once

#include <algorithm>
#include <vector>

#include "../common/ring.h"
#include "rows.h"

namespace adaqn::cpu {

/// A free row is not read: its coefficient would be zero.
template <class R>
std::vector<const R*> pair_rows(const Matrix& ring, const PairRing& pairs) {
  std::vector<const R*> rows;
  for (int age = 0; age < pairs.pairs; ++age) rows.push_back(row<const R>(ring, pairs.slot(age)));
  return rows;
}

/// From one number per slot to one per age.
template <class T>
std::vector<T> by_age(const std::vector<double>& by_slot, const PairRing& pairs) {
  std::vector<T> numbers;
  for (int age = 0; age < pairs.pairs; ++age) {
    numbers.push_back(static_cast<T>(by_slot[pairs.slot(age)]));
  }
  return numbers;
}

/// From one number per age to one per slot; zero in slots without a pair.
inline void scatter_by_slot(const double* by_age, const PairRing& pairs, double* by_slot) {
  std::fill_n(by_slot, pairs.slots, 0.0);
  for (int age = 0; age < pairs.pairs; ++age) by_slot[pairs.slot(age)] = by_age[age];
}

}  // namespace adaqn::cpu
