// Averages of the gradient and of its squares: momentum and the diagonal, block by block.
#pragma once

#include <cmath>

#include "../common/averages.h"

namespace adaqn::cpu {

struct Averages {
  double beta;
  void* momentum;  ///< null: none
  double keep;
  double add;
  double eps;
  bool correct_bias;
  void* accumulator;  ///< null: no diagonal

  /// The same where no gradient enters v.
  Averages standing() const {
    Averages other = *this;
    other.keep = 1;
    other.add = 0;
    return other;
  }
};

/// Momentum, element by element.
template <class T>
struct Momentum {
  T of_old, of_gradient, keep, add;

  explicit Momentum(const LookAhead& look)
      : of_old(static_cast<T>(look.of_old)),
        of_gradient(static_cast<T>(look.of_gradient)),
        keep(static_cast<T>(look.beta)),
        add(static_cast<T>(1 - look.beta)) {}

  /// m moves on; returns q of LookAhead.
  T look_ahead(T g, T& m) const {
    const T q = of_old * m + of_gradient * g;
    m = keep * m + add * g;
    return q;
  }
};

/// D = 1 / sqrt(correction v + eps), element by element.
template <class T>
struct Diagonal {
  T keep, add, eps, correction;

  Diagonal(const Averages& a, T bias_correction)
      : keep(static_cast<T>(a.keep)),
        add(static_cast<T>(a.add)),
        eps(static_cast<T>(a.eps)),
        correction(bias_correction) {}

  /// v moves on; returns 1 / D with the new one.
  T root(T g, T& v) const {
    v = keep * v + add * g * g;
    return std::sqrt(correction * v + eps);
  }
};

/// Momentum moves on, and q of LookAhead is formed.
template <class T>
inline void blend(const Averages& a, const LookAhead& look, const T* g, int64_t at, int64_t n,
                  T* q) {
  T* m = static_cast<T*>(a.momentum) + at;
  const Momentum<T> momentum(look);
  for (int64_t k = 0; k < n; ++k) q[k] = momentum.look_ahead(g[k], m[k]);
}

/// The accumulator v moves on, and r becomes D r with the new one. Returns |D q|^2.
template <class T>
inline double scale_by_diagonal(const Averages& a, T correction, const T* g, const T* q, int64_t at,
                                int64_t n, T* r) {
  T* v = static_cast<T*>(a.accumulator) + at;
  const Diagonal<T> diagonal(a, correction);
  double square = 0;
#pragma omp simd reduction(+ : square)
  for (int64_t k = 0; k < n; ++k) {
    const T root = diagonal.root(g[k], v[k]);
    const double scaled = q[k] / root;
    square += scaled * scaled;
    r[k] /= root;
  }
  return square;
}

}  // namespace adaqn::cpu
