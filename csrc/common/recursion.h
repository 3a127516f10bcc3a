// The two-loop recursion (Nocedal & Wright, Algorithm 7.4) on m numbers instead of m vectors.
//
// gram is (slots + 1) x slots, row by row and by slot: gram[i, j] = s_i.y_j, and its last row holds
// y_j.y_j.  Only s_i.y_j with pair j not older than pair i is read.  Coefficients are by slot, and
// zero where no pair is.
#pragma once

#include "ring.h"

namespace adaqn {

/// First loop, newest to oldest:  a_i = (u_i - sum_{j newer} a_j s_i.y_j) / s_i.y_i.
ADAQN_HOST_DEVICE inline void backward_coefficients(const double* gram, const PairRing& ring,
                                                    const double* u, double* a) {
  for (int i = 0; i < ring.slots; ++i) a[i] = 0;
  for (int age = ring.pairs - 1; age >= 0; --age) {
    const int i = ring.slot(age);
    const double* row = gram + i * ring.slots;
    double rest = u[i];
    for (int newer = age + 1; newer < ring.pairs; ++newer) {
      const int j = ring.slot(newer);
      rest -= a[j] * row[j];
    }
    a[i] = rest / row[i];
  }
}

/// Second loop, oldest to newest:  c_i = a_i - (z_i + sum_{j older} c_j s_j.y_i) / s_i.y_i.
ADAQN_HOST_DEVICE inline void forward_coefficients(const double* gram, const PairRing& ring,
                                                   const double* a, const double* z, double* c) {
  for (int i = 0; i < ring.slots; ++i) c[i] = 0;
  for (int age = 0; age < ring.pairs; ++age) {
    const int i = ring.slot(age);
    double sum = z[i];
    for (int older = 0; older < age; ++older) {
      const int j = ring.slot(older);
      sum += c[j] * gram[j * ring.slots + i];
    }
    c[i] = a[i] - sum / gram[i * ring.slots + i];
  }
}

/// gamma = s.y / y.y of the newest pair (Barzilai-Borwein); 1 while there is none.
ADAQN_HOST_DEVICE inline double scalar_initial_matrix(const double* gram, const PairRing& ring) {
  if (ring.pairs == 0) return 1;
  const int newest = ring.slot(ring.pairs - 1);
  return gram[newest * ring.slots + newest] / gram[ring.slots * ring.slots + newest];
}

}  // namespace adaqn
