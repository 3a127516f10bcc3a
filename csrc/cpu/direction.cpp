#include "direction.h"

#include <cmath>

#include "../common/acceptance.h"
#include "../common/recursion.h"
#include "dispatch.h"
#include "pairs.h"

namespace adaqn::cpu {
namespace {

template <class T>
inline void load_gradient(const Gradient& gradient, int64_t at, int64_t n, T* g) {
  gradient.tensors.load(at, n, g);
  if (gradient.scaled) {
    const T scale = static_cast<T>(gradient.scale);
    for (int64_t k = 0; k < n; ++k) g[k] /= scale;
  }
  if (gradient.maximize) {
    for (int64_t k = 0; k < n; ++k) g[k] = -g[k];
  }
}

/// Adds to the words of namespace flag.
template <class T>
inline void count_flags(const T* g, int64_t n, double* flags) {
  int32_t nonfinite = 0, nonzero = 0;
#pragma omp simd reduction(+ : nonfinite, nonzero)
  for (int64_t k = 0; k < n; ++k) {
    nonfinite += is_finite(g[k]) ? 0 : 1;
    nonzero += g[k] != 0 ? 1 : 0;
  }
  flags[flag::nonfinite] += nonfinite;
  flags[flag::nonzero] += nonzero;
}

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
      T g[kBlock];
      load_gradient(a.gradient, at, n, g);
      add_products(s, at, n, g, sums);
      count_flags(g, n, sums + ring.pairs);
    });
  };
  for_chunks(parallel_for, a.gradient.tensors.size(), Order::forward, chunk);

  const auto total = partial.total();
  double* flags = a.projections + ring.slots;
  scatter_by_slot(total.data(), ring, a.projections);
  flags[flag::nonfinite] = total[ring.pairs + flag::nonfinite] + a.found_inf;
  flags[flag::nonzero] = total[ring.pairs + flag::nonzero];
}

/// r = D q with the new accumulator v; q becomes r.
template <class T>
inline void scale_by_diagonal(const Pass2& a, const T* g, int64_t at, int64_t n, T* q) {
  T* v = static_cast<T*>(a.accumulator) + at;
  const T keep = static_cast<T>(a.keep), add = static_cast<T>(a.add);
  const T eps = static_cast<T>(a.eps);
  for (int64_t k = 0; k < n; ++k) {
    v[k] = keep * v[k] + add * g[k] * g[k];
    q[k] /= std::sqrt(v[k] + eps);
  }
}

template <class T, class R, class F>
void pass2(ParallelFor parallel_for, const Pass2& a, T, R, F) {
  const PairRing ring(a.counters, static_cast<int>(a.y_ring.rows));
  if (!step_is_accepted(a.projections + ring.slots, a.counters)) return;
  const auto y = pair_rows<R>(a.y_ring, ring);
  auto minus_a = by_age<T>(backward(a.gram, ring, a.projections), ring);
  for (T& number : minus_a) number = -number;
  const T gamma = static_cast<T>(scalar_initial_matrix(a.gram, ring));
  T* direction = static_cast<T*>(a.direction);
  F* newest = row<F>(a.fisher, a.counters[counter::next_gradient]);
  PartialSums partial(a.gradient.tensors.size(), ring.pairs);
  const auto chunk = [&](int64_t index, int64_t begin, int64_t end) {
    for_blocks(begin, end, [&](int64_t at, int64_t n) {
      T g[kBlock], r[kBlock];
      load_gradient(a.gradient, at, n, g);
      std::copy_n(g, n, r);
      add_combination(y, minus_a, at, n, r);
      if (a.accumulator != nullptr) {
        scale_by_diagonal(a, g, at, n, r);
      } else {
        for (int64_t k = 0; k < n; ++k) r[k] *= gamma;
      }
      for (int64_t k = 0; k < n; ++k) newest[at + k] = convert<F>(g[k]);
      std::copy_n(r, n, direction + at);
      add_products(y, at, n, r, partial.of(index));
    });
  };
  for_chunks(parallel_for, a.gradient.tensors.size(), Order::backward, chunk);
  scatter_by_slot(partial.total().data(), ring, a.images);
}

/// w = (1 - lr weight_decay) w - lr p for elements begin..begin+n.
template <class T>
inline void descend(const std::vector<Rates>& rates, int64_t begin, int64_t n, const T* p, T* w) {
  auto run = std::upper_bound(rates.begin(), rates.end(), begin,
                              [](int64_t at, const Rates& r) { return at < r.end; });
  for (int64_t k = 0; k < n; ++run) {
    const int64_t end = std::min(n, run->end - begin);
    const T lr = static_cast<T>(run->lr);
    const T shrink = static_cast<T>(1 - run->lr * run->weight_decay);
    for (; k < end; ++k) w[k] = shrink * w[k] - lr * p[k];
  }
}

template <class T, class R>
void pass3(ParallelFor parallel_for, const Pass3& a, T, R) {
  const PairRing ring(a.counters, static_cast<int>(a.s_ring.rows));
  const double* flags = a.projections + ring.slots;
  const bool accepted = step_is_accepted(flags, a.counters);
  if (accepted) {
    const auto s = pair_rows<R>(a.s_ring, ring);
    const auto c = by_age<T>(forward(a.gram, ring, a.projections, a.images), ring);
    const T* direction = static_cast<const T*>(a.direction);
    T* sum = static_cast<T*>(a.iterate_sum);
    const auto chunk = [&](int64_t, int64_t begin, int64_t end) {
      for_blocks(begin, end, [&](int64_t at, int64_t n) {
        T p[kBlock], w[kBlock];
        std::copy_n(direction + at, n, p);
        add_combination(s, c, at, n, p);
        a.params.load(at, n, w);
        for (int64_t k = 0; k < n; ++k) sum[at + k] += w[k];
        descend(a.rates, at, n, p, w);
        a.params.store(at, n, w);
      });
    };
    for_chunks(parallel_for, a.params.size(), Order::forward, chunk);
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

void direction_pass3(ParallelFor parallel_for, const Pass3& a) {
  with_vector_type(a.dtype, [&](auto t) {
    with_ring_type<decltype(t)>(a.s_ring.dtype, [&](auto r) { pass3(parallel_for, a, t, r); });
  });
}

}  // namespace adaqn::cpu
