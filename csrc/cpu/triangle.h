// The two-loop recursion on m numbers, as common/recursion.h has it, for any number of pairs: rows
// of the triangle in at most two runs of slots, each with wide instructions.
//
// The triangle is R[i, j] = s_i.y_j with pair j not older than pair i, in a gram of slots + 1 rows.
#pragma once

#include <vector>

#include "../common/ring.h"

namespace adaqn::cpu {

/// Calls body(first, count) for the runs of slots that hold the pairs of ages begin..pairs.
template <class Body>
inline void for_runs(const PairRing& ring, int begin, const Body& body) {
  const int count = ring.pairs - begin, first = ring.slot(begin);
  const int straight = count < ring.slots - first ? count : ring.slots - first;
  if (straight > 0) body(first, straight);
  if (count > straight) body(0, count - straight);
}

inline double dot(const double* x, const double* y, int count) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int k = 0; k < count; ++k) sum += x[k] * y[k];
  return sum;
}

/// a by slot with R a = u.
inline std::vector<double> solve_backward(const double* gram, const PairRing& ring,
                                          const double* u) {
  std::vector<double> a(static_cast<size_t>(ring.slots));
  for (int age = ring.pairs - 1; age >= 0; --age) {
    const int i = ring.slot(age);
    const double* row = gram + static_cast<int64_t>(i) * ring.slots;
    double rest = u[i];
    for_runs(ring, age + 1,
             [&](int first, int count) { rest -= dot(row + first, a.data() + first, count); });
    a[i] = rest / row[i];
  }
  return a;
}

/// c by slot with R^T c = right, which is used up.
inline std::vector<double> solve_forward(const double* gram, const PairRing& ring,
                                         std::vector<double>& right) {
  std::vector<double> c(static_cast<size_t>(ring.slots));
  for (int age = 0; age < ring.pairs; ++age) {
    const int i = ring.slot(age);
    const double* row = gram + static_cast<int64_t>(i) * ring.slots;
    const double found = c[i] = right[i] / row[i];
    for_runs(ring, age + 1, [&](int first, int count) {
      double* rest = right.data() + first;
#pragma omp simd
      for (int k = 0; k < count; ++k) rest[k] -= found * row[first + k];
    });
  }
  return c;
}

}  // namespace adaqn::cpu
