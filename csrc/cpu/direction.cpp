#include "direction.h"

#include <cmath>
#include <limits>

#include "../common/acceptance.h"
#include "../common/recursion.h"
#include "dispatch.h"
#include "pairs.h"

namespace adaqn::cpu {
namespace {

std::vector<double> backward(const double* gram, const PairRing& ring, const double* projections) {
  std::vector<double> a(static_cast<size_t>(ring.slots));
  backward_coefficients(gram, ring, projections, a.data());
  return a;
}

std::vector<double> forward(const double* gram, const PairRing& ring, const double* projections,
                            const double* images) {
  std::vector<double> c(static_cast<size_t>(ring.slots));
  forward_coefficients(gram, ring, backward(gram, ring, projections).data(), images, c.data());
  return c;
}

template <class T, class R>
void pass1(ParallelFor parallel_for, const Pass1& a, T, R) {
  const PairRing ring(a.counters, static_cast<int>(a.s_ring.rows));
  const auto s = pair_rows<R>(a.s_ring, ring);
  PartialSums partial(a.gradient.tensors.size(), ring.pairs + flag::count);
  const auto chunk = [&](int64_t index, int64_t begin, int64_t end) {
    double* sums = partial.of(index);
    for_blocks(begin, end, [&](int64_t at, int64_t n) {
      T block[kBlock];
      const T* g = view_gradient(a.gradient, T(1), at, n, block);
      add_products(s, at, n, g, sums);
      add_flags(g, n, sums + ring.pairs);
    });
  };
  for_chunks(parallel_for, a.gradient.tensors.size(), Order::forward, chunk);

  const auto total = partial.total();
  double* flags = a.projections + ring.slots;
  std::copy_n(total.data() + ring.pairs, int{flag::count}, flags);
  flags[flag::nonfinite] += a.found_inf;
  const double clip = clip_factor(flags, a.gradient.max_norm);
  const LookAhead look(a.counters, a.beta);
  std::fill_n(a.projections, ring.slots, 0.0);
  for (int age = 0; age < ring.pairs; ++age) {
    const int i = ring.slot(age);
    a.projections[i] = look.projection(a.moments[i], finite_or_zero(clip * total[age]));
  }
}

/// r becomes gamma r; returns |gamma q|^2.
template <class T>
inline double scale_by_scalar(T gamma, const T* q, int64_t n, T* r) {
  double square = 0;
#pragma omp simd reduction(+ : square)
  for (int64_t k = 0; k < n; ++k) {
    const double scaled = gamma * q[k];
    square += scaled * scaled;
    r[k] *= gamma;
  }
  return square;
}

template <class T, class R, class F>
void pass2(ParallelFor parallel_for, const Pass2& a, T, R, F) {
  const PairRing ring(a.counters, static_cast<int>(a.y_ring.rows));
  const double* flags = a.projections + ring.slots;
  if (!step_is_accepted(flags, a.counters)) return;
  const auto y = pair_rows<R>(a.y_ring, ring);
  auto minus_a = by_age<T>(backward(a.gram, ring, a.projections), ring);
  for (T& number : minus_a) number = -number;
  const auto blends = blends_of<T>(a.averages, a.counters);
  T *m = static_cast<T*>(a.averages.momentum), *v = static_cast<T*>(a.averages.accumulator);
  const T clip = static_cast<T>(clip_factor(flags, a.gradient.max_norm));
  const T gamma = static_cast<T>(scalar_initial_matrix(a.gram, ring));
  T* direction = static_cast<T*>(a.direction);
  F* newest = a.fisher.rows > 0 ? row<F>(a.fisher, a.counters[counter::next_gradient]) : nullptr;
  PartialSums partial(a.gradient.tensors.size(), ring.pairs + 1);
  const auto chunk = [&](int64_t index, int64_t begin, int64_t end) {
    double* sums = partial.of(index);
    for_blocks(a.gradient.tensors, begin, end, [&](int64_t at, int64_t n, bool present) {
      T block[kBlock], blended[kBlock], r[kBlock];
      const T* g = view_gradient(a.gradient, clip, at, n, block);
      const T* q = m != nullptr && present ? blended : g;
      if (q == blended) {
        for_runs(blends, at, n, [&](const Blend<T>& own, int64_t first, int64_t last) {
          blend(own.momentum, g + first, last - first, m + at + first, blended + first);
        });
      }
      std::copy_n(q, n, r);
      add_combination(y, minus_a, at, n, r);
      if (v != nullptr) {
        for_runs(blends, at, n, [&](const Blend<T>& own, int64_t first, int64_t last) {
          const Diagonal<T> diagonal = present ? own.diagonal : own.diagonal.standing();
          sums[ring.pairs] += scale_by_diagonal(diagonal, g + first, q + first, last - first,
                                                v + at + first, r + first);
        });
      } else if (!a.identity) {
        sums[ring.pairs] += scale_by_scalar(gamma, q, n, r);
      }
      if (newest != nullptr) {
        for (int64_t k = 0; k < n; ++k) newest[at + k] = convert<F>(g[k]);
      }
      std::copy_n(r, n, direction + at);
      if (!a.identity) add_products(y, at, n, r, sums);
    });
  };
  for_chunks(parallel_for, a.gradient.tensors.size(), Order::backward, chunk);
  if (a.identity) return;
  auto total = partial.total();
  std::transform(total.begin(), total.end(), total.begin(), finite_or_zero);
  scatter_by_slot(total.data(), ring, a.images);
  a.images[ring.slots] = total[ring.pairs];
}

template <class T, class R>
void images(ParallelFor parallel_for, const Images& a, T, R) {
  const PairRing ring(a.counters, static_cast<int>(a.y_ring.rows));
  if (!step_is_accepted(a.projections + ring.slots, a.counters)) return;
  const auto y = pair_rows<R>(a.y_ring, ring);
  const T* direction = static_cast<const T*>(a.direction);
  PartialSums partial(a.y_ring.columns, ring.pairs);
  const auto chunk = [&](int64_t index, int64_t begin, int64_t end) {
    for_blocks(begin, end, [&](int64_t at, int64_t n) {
      add_products(y, at, n, direction + at, partial.of(index));
    });
  };
  for_chunks(parallel_for, a.y_ring.columns, Order::backward, chunk);
  auto total = partial.total();
  std::transform(total.begin(), total.end(), total.begin(), finite_or_zero);
  scatter_by_slot(total.data(), ring, a.images);
}

/// p = r + sum_i c_i s_i, of which r is in memory.
template <class T, class R>
struct Direction {
  T* r;
  std::vector<const R*> s;
  std::vector<T> c;
};

/// p takes the place of r.  Returns min(1, max_direction |H0 q| / |p|).
template <class T, class R>
double cap_direction(ParallelFor parallel_for, const Pass3& a, Direction<T, R>& p) {
  PartialSums partial(a.params.size(), 1);
  const auto chunk = [&](int64_t index, int64_t begin, int64_t end) {
    for_blocks(a.gradients, begin, end, [&](int64_t at, int64_t n, bool present) {
      if (!present) return;
      add_combination(p.s, p.c, at, n, p.r + at);
      *partial.of(index) += sum_of_squares(p.r + at, n);
    });
  };
  for_chunks(parallel_for, a.params.size(), Order::forward, chunk);
  p.s.clear();
  p.c.clear();
  const double size = std::sqrt(partial.total()[0]);
  const double limit = a.max_direction * std::sqrt(a.images[a.s_ring.rows]);
  return size > limit ? limit / size : 1;
}

/// w_sum += w;  w = (1 - lr weight_decay) w - lr p where there is a gradient.
template <class T, class R>
void move(ParallelFor parallel_for, const Pass3& a, const PairRing& ring, T, R) {
  const auto coefficients = forward(a.gram, ring, a.projections, a.images);
  Direction<T, R> p{static_cast<T*>(a.direction), pair_rows<R>(a.s_ring, ring),
                    by_age<T>(coefficients, ring)};
  const bool capped = a.max_direction < std::numeric_limits<double>::infinity();
  const double factor = capped ? cap_direction(parallel_for, a, p) : 1;
  T* sum = static_cast<T*>(a.iterate_sum);
  const auto chunk = [&](int64_t, int64_t begin, int64_t end) {
    for_blocks(a.gradients, begin, end, [&](int64_t at, int64_t n, bool present) {
      T block[kBlock], w[kBlock];
      a.params.load(at, n, w);
      if (sum != nullptr) {
        for (int64_t k = 0; k < n; ++k) sum[at + k] += w[k];
      }
      if (!present) return;
      std::copy_n(p.r + at, n, block);
      add_combination(p.s, p.c, at, n, block);
      descend(a.rates, factor, at, n, block, w);
      a.params.store(at, n, w);
    });
  };
  for_chunks(parallel_for, a.params.size(), capped ? Order::backward : Order::forward, chunk);
}

template <class T, class R>
void pass3(ParallelFor parallel_for, const Pass3& a, T t, R r) {
  const PairRing ring(a.counters, static_cast<int>(a.s_ring.rows));
  const double* flags = a.projections + ring.slots;
  const bool accepted = step_is_accepted(flags, a.counters);
  if (accepted) {
    move(parallel_for, a, ring, t, r);
    const LookAhead look(a.counters, a.beta);
    for (int age = 0; age < ring.pairs; ++age) {
      const int i = ring.slot(age);
      a.moments[i] = look.next_moment(a.moments[i], a.projections[i]);
    }
  }
  count_step(a.counters, flags, accepted, a.fisher_size);
}

}  // namespace

void direction_pass1(ParallelFor parallel_for, const Pass1& a) {
  with_vector_type(a.dtype, [&](auto t) {
    with_ring_type<decltype(t)>(a.s_ring.dtype, [&](auto r) { pass1(parallel_for, a, t, r); });
  });
}

void direction_pass2(ParallelFor parallel_for, const Pass2& a) {
  with_vector_type(a.dtype, [&](auto t) {
    with_ring_type<decltype(t)>(a.y_ring.dtype, [&](auto r) {
      with_ring_type<decltype(t)>(a.fisher.dtype, [&](auto f) { pass2(parallel_for, a, t, r, f); });
    });
  });
}

void direction_images(ParallelFor parallel_for, const Images& a) {
  with_vector_type(a.dtype, [&](auto t) {
    with_ring_type<decltype(t)>(a.y_ring.dtype, [&](auto r) { images(parallel_for, a, t, r); });
  });
}

void direction_pass3(ParallelFor parallel_for, const Pass3& a) {
  with_vector_type(a.dtype, [&](auto t) {
    with_ring_type<decltype(t)>(a.s_ring.dtype, [&](auto r) { pass3(parallel_for, a, t, r); });
  });
}

}  // namespace adaqn::cpu
