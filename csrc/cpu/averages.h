// Averages of the gradient and of its squares: momentum and the diagonal, block by block.
#pragma once

#include <cmath>
#include <vector>

#include "../common/averages.h"
#include "runs.h"

namespace adaqn::cpu {

/// How gradients are averaged, of elements up to `end`, from the end of the run before.
struct Averaging {
  int64_t end;
  double beta;
  double keep;
  double add;
  double eps;
};

struct Averages {
  std::vector<Averaging> runs;  ///< one, where all groups are alike
  bool correct_bias;
  void* momentum;     ///< null: none
  void* accumulator;  ///< null: no diagonal
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

  Diagonal(const Averaging& own, double bias_correction)
      : keep(static_cast<T>(own.keep)),
        add(static_cast<T>(own.add)),
        eps(static_cast<T>(own.eps)),
        correction(static_cast<T>(bias_correction)) {}

  /// The same where no gradient enters v.
  Diagonal standing() const {
    Diagonal other = *this;
    other.keep = 1;
    other.add = 0;
    return other;
  }

  /// v moves on; returns 1 / D with the new one.
  T root(T g, T& v) const {
    v = keep * v + add * g * g;
    return std::sqrt(correction * v + eps);
  }
};

/// Both, of elements up to `end`, from the end of the run before.
template <class T>
struct Blend {
  int64_t end;
  Momentum<T> momentum;
  Diagonal<T> diagonal;

  /// `counters` as they are before an accepted step is counted.
  Blend(const Averaging& own, bool correct_bias, const int64_t* counters)
      : end(own.end),
        momentum(LookAhead(counters, own.beta)),
        diagonal(own, bias_correction(counters, own.keep, correct_bias)) {}
};

template <class T>
inline std::vector<Blend<T>> blends_of(const Averages& a, const int64_t* counters) {
  std::vector<Blend<T>> blends;
  blends.reserve(a.runs.size());
  for (const Averaging& own : a.runs) blends.emplace_back(own, a.correct_bias, counters);
  return blends;
}

/// Momentum moves on, and q of LookAhead is formed.
template <class T>
inline void blend(const Momentum<T> momentum, const T* g, int64_t n, T* m, T* q) {
  for (int64_t k = 0; k < n; ++k) q[k] = momentum.look_ahead(g[k], m[k]);
}

/// The accumulator v moves on, and r becomes D r with the new one. Returns |D q|^2.
template <class T>
inline double scale_by_diagonal(const Diagonal<T> diagonal, const T* g, const T* q, int64_t n, T* v,
                                T* r) {
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
