// The gradient to descend, block by block, and what is measured of it.
#pragma once

#include "../common/layout.h"
#include "parallel.h"
#include "scattered.h"

namespace adaqn::cpu {

/// tensors / scale, negated to maximize, then clipped to a norm of at most `max_norm`.
struct Gradient {
  Scattered tensors;
  bool scaled;
  double scale;
  bool maximize;
  double max_norm;
};

/// Calls body(begin, n, present) for every block of begin..end, cut where tensors that are there
/// and tensors that are not meet: the parameters of the latter stand still.
template <class Body>
inline void for_blocks(const Scattered& gradients, int64_t begin, int64_t end, const Body& body) {
  for (int64_t at = begin; at < end;) {
    const Run run = gradients.run(at, std::min(end, at + kBlock));
    body(at, run.end - at, run.present);
    at = run.end;
  }
}

/// From elements as given to the gradient to descend.  `clip` is clip_factor of the flags, or 1 for
/// what they are measured of.
template <class T>
inline void finish_gradient(const Gradient& gradient, T clip, int64_t n, T* g) {
  if (gradient.scaled) {
    const T scale = static_cast<T>(gradient.scale);
    for (int64_t k = 0; k < n; ++k) g[k] /= scale;
  }
  if (gradient.maximize) {
    for (int64_t k = 0; k < n; ++k) g[k] = -g[k];
  }
  if (clip != 1) {
    for (int64_t k = 0; k < n; ++k) g[k] *= clip;
  }
}

template <class T>
inline void load_gradient(const Gradient& gradient, T clip, int64_t at, int64_t n, T* g) {
  gradient.tensors.load(at, n, g);
  finish_gradient(gradient, clip, n, g);
}

/// Rows of one tensor's gradient, which is there.
template <class T>
inline void load_gradient(const Gradient& gradient, T clip, const Rows& rows, T* g,
                          int64_t stride) {
  gradient.tensors.load_rows(rows, g, stride);
  for (int64_t k = 0; k < rows.count; ++k) {
    finish_gradient(gradient, clip, rows.length, g + k * stride);
  }
}

/// Elements at..at+n, where they are or in `block`.
template <class T>
inline const T* view_gradient(const Gradient& gradient, T clip, int64_t at, int64_t n, T* block) {
  if (!gradient.scaled && !gradient.maximize && clip == 1) {
    return gradient.tensors.view(at, n, block);
  }
  load_gradient(gradient, clip, at, n, block);
  return block;
}

template <class T>
inline double square(T x) {
  const double wide = x;
  return wide * wide;
}

/// Adds to the words of namespace flag.  Four sums side by side keep up with the memory; each
/// addition of one has to wait for the one before.
template <class T>
inline void add_flags(const T* g, int64_t n, double* flags) {
  const int64_t part = n / 4;
  const T *g0 = g, *g1 = g + part, *g2 = g + 2 * part, *g3 = g + 3 * part;
  int32_t nonfinite = 0, nonzero = 0;
  double s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : nonfinite, nonzero, s0, s1, s2, s3)
  for (int64_t k = 0; k < part; ++k) {
    nonfinite += !is_finite(g0[k]) + !is_finite(g1[k]) + !is_finite(g2[k]) + !is_finite(g3[k]);
    nonzero += (g0[k] != 0) + (g1[k] != 0) + (g2[k] != 0) + (g3[k] != 0);
    s0 += square(g0[k]);
    s1 += square(g1[k]);
    s2 += square(g2[k]);
    s3 += square(g3[k]);
  }
  for (int64_t k = 4 * part; k < n; ++k) {
    nonfinite += !is_finite(g[k]);
    nonzero += g[k] != 0;
    s0 += square(g[k]);
  }
  flags[flag::nonfinite] += nonfinite;
  flags[flag::nonzero] += nonzero;
  flags[flag::square] += s0 + s1 + s2 + s3;
}

}  // namespace adaqn::cpu
