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

/// Adds to the words of namespace flag.
template <class T>
inline void add_flags(const T* g, int64_t n, double* flags) {
  int32_t nonfinite = 0, nonzero = 0;
  double square = 0;
#pragma omp simd reduction(+ : nonfinite, nonzero, square)
  for (int64_t k = 0; k < n; ++k) {
    const double wide = g[k];
    nonfinite += is_finite(g[k]) ? 0 : 1;
    nonzero += g[k] != 0 ? 1 : 0;
    square += wide * wide;
  }
  flags[flag::nonfinite] += nonfinite;
  flags[flag::nonzero] += nonzero;
  flags[flag::square] += square;
}

}  // namespace adaqn::cpu
