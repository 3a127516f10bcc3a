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

/// Momentum moves on, and q of LookAhead is formed.
template <class T>
inline void blend(const Averages& a, const LookAhead& look, const T* g, int64_t at, int64_t n,
                  T* q) {
  T* m = static_cast<T*>(a.momentum) + at;
  const T of_old = static_cast<T>(look.of_old), of_gradient = static_cast<T>(look.of_gradient);
  const T keep = static_cast<T>(a.beta), add = static_cast<T>(1 - a.beta);
  for (int64_t k = 0; k < n; ++k) {
    q[k] = of_old * m[k] + of_gradient * g[k];
    m[k] = keep * m[k] + add * g[k];
  }
}

/// The accumulator v moves on, and r becomes D r with the new one, D = 1 / sqrt(correction v +
/// eps). Returns |D q|^2.
template <class T>
inline double scale_by_diagonal(const Averages& a, T correction, const T* g, const T* q, int64_t at,
                                int64_t n, T* r) {
  T* v = static_cast<T*>(a.accumulator) + at;
  const T keep = static_cast<T>(a.keep), add = static_cast<T>(a.add);
  const T eps = static_cast<T>(a.eps);
  double square = 0;
#pragma omp simd reduction(+ : square)
  for (int64_t k = 0; k < n; ++k) {
    v[k] = keep * v[k] + add * g[k] * g[k];
    const T root = std::sqrt(correction * v[k] + eps);
    const double scaled = q[k] / root;
    square += scaled * scaled;
    r[k] /= root;
  }
  return square;
}

}  // namespace adaqn::cpu
