// Averages of gradients: clipping, momentum with look-ahead, bias correction; and the words s_i.m.
#pragma once

#include <cmath>

#include "layout.h"

namespace adaqn {

/// What g is multiplied with so that its norm is at most `max_norm`, which may be infinite.
ADAQN_HOST_DEVICE inline double clip_factor(const double* flags, double max_norm) {
  const double norm = sqrt(flags[flag::square]);
  return norm > max_norm ? max_norm / norm : 1.0;
}

/// Momentum m_t = beta m_(t-1) + (1 - beta) g, and q, the bias-corrected momentum one step ahead:
/// q = beta m_t / (1 - beta^(t+1)) + (1 - beta) g / (1 - beta^t), at the t-th accepted step.
struct LookAhead {
  double beta;
  double of_old, of_gradient;  ///< q = of_old m_(t-1) + of_gradient g

  /// t; `counters` as they are before the step is counted.
  ADAQN_HOST_DEVICE static double step(const int64_t* counters) {
    return static_cast<double>(counters[counter::accepted] + 1);
  }

  /// `power` is beta^t, `next` beta^(t+1).
  ADAQN_HOST_DEVICE LookAhead(double beta_, double power, double next) : beta(beta_) {
    const double ahead = beta / (1 - next), now = (1 - beta) / (1 - power);
    of_old = ahead * beta;
    of_gradient = ahead * (1 - beta) + now;
  }

  ADAQN_HOST_DEVICE LookAhead(const int64_t* counters, double beta_)
      : LookAhead(beta_, pow(beta_, step(counters)), pow(beta_, step(counters) + 1)) {}

  /// u = s.q, from s.m of the old momentum and s.g of the clipped gradient.
  ADAQN_HOST_DEVICE double projection(double s_m, double s_g) const {
    return of_old * s_m + of_gradient * s_g;
  }

  /// s.m of the new momentum, from that of the old and u.
  ADAQN_HOST_DEVICE double next_moment(double s_m, double u) const {
    return beta * s_m + (1 - beta) * ((u - of_old * s_m) / of_gradient);
  }
};

/// 1 / (1 - keep^t), by which an average that began at zero is too small; 1 for a sum (keep = 1).
/// `pending` is 1 before an accepted step is counted, and 0 after.
ADAQN_HOST_DEVICE inline double bias_correction(const int64_t* counters, double keep, bool enabled,
                                                int pending = 1) {
  if (!enabled || keep == 1) return 1;
  const double t = static_cast<double>(counters[counter::accepted] + pending);
  return 1 / (1 - pow(keep, t < 1 ? 1 : t));
}

}  // namespace adaqn
