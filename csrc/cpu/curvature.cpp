#include "curvature.h"

#include "../common/acceptance.h"
#include "../common/damping.h"
#include "dispatch.h"
#include "pairs.h"

namespace adaqn::cpu {
namespace {

/// The gradients in the ring, which fill its first rows.
template <class F>
std::vector<const F*> gradient_rows(const Matrix& fisher, const int64_t* counters) {
  std::vector<const F*> rows;
  for (int64_t j = 0; j < counters[counter::gradients]; ++j) rows.push_back(row<F>(fisher, j));
  return rows;
}

/// What a sum of iterates is divided by.
template <class T>
T divisor(const int64_t* counters) {
  return static_cast<T>(std::max<int64_t>(counters[counter::iterates], 1));
}

template <class T>
inline void load_displacement(const Displacement& displacement, T divisor, int64_t at, int64_t n,
                              T* s) {
  const T* sum = static_cast<const T*>(displacement.iterate_sum) + at;
  const T* anchor = static_cast<const T*>(displacement.anchor) + at;
  for (int64_t k = 0; k < n; ++k) s[k] = sum[k] / divisor - anchor[k];
}

/// The weights, from F_j.s of the gradients and then s.B0 s.
void weigh(const PassA& a, size_t gradients, const std::vector<double>& products) {
  std::fill_n(a.weights, a.fisher.rows, 0.0);
  double s_y = 0;
  for (size_t j = 0; j < gradients; ++j) {
    a.weights[j] = a.is_explicit ? 1 : products[j] / static_cast<double>(gradients);
    s_y += a.weights[j] * products[j];
  }
  const double theta = a.image != nullptr ? damping_factor(s_y, products[gradients], a.damping) : 1;
  for (size_t j = 0; j < gradients; ++j) a.weights[j] *= theta;
  a.weights[a.fisher.rows] = 1 - theta;
}

template <class T, class F>
void pass_a(ParallelFor parallel_for, const PassA& a, T, F) {
  const auto gradients = gradient_rows<F>(a.fisher, a.counters);
  const auto image = optional_row<T>(a.image);
  const T count = divisor<T>(a.counters);
  PartialSums partial(a.fisher.columns, static_cast<int>(gradients.size() + image.size()));
  const auto chunk = [&](int64_t index, int64_t begin, int64_t end) {
    double* sums = partial.of(index);
    for_blocks(begin, end, [&](int64_t at, int64_t n) {
      T s[kBlock];
      load_displacement(a.s, count, at, n, s);
      add_products(gradients, at, n, s, sums);
      add_products(image, at, n, s, sums + gradients.size());
    });
  };
  for_chunks(parallel_for, a.fisher.columns, Order::forward, chunk);
  weigh(a, gradients.size(), partial.total());
}

/// Rounds the block x to the ring's dtype, in `to` and in x itself; returns how many elements are
/// not finite then.
template <class T, class R>
inline int32_t store_rounded(T* x, int64_t n, R* to) {
  int32_t nonfinite = 0;
#pragma omp simd reduction(+ : nonfinite)
  for (int64_t k = 0; k < n; ++k) {
    to[k] = convert<R>(x[k]);
    x[k] = convert<T>(to[k]);
    nonfinite += is_finite(x[k]) ? 0 : 1;
  }
  return nonfinite;
}

/// Words of pass B's sums behind s_i.y of the pairs: s.y, y.y, s.m, elements that are not finite.
enum : int { kOwnProduct, kSquare, kMoment, kNonfinite, kWords };

template <class T, class F, class R>
void pass_b(ParallelFor parallel_for, const PassB& a, T, F, R) {
  if (!step_is_accepted(a.flags, a.counters)) return;
  const int64_t size = a.fisher.columns;
  const PairRing ring(a.counters, static_cast<int>(a.s_ring.rows));
  const auto gradients = gradient_rows<F>(a.fisher, a.counters);
  const std::vector<T> weights(a.weights, a.weights + gradients.size());
  const auto image = optional_row<T>(a.image), momentum = optional_row<T>(a.momentum);
  const std::vector<T> image_weight(image.size(), static_cast<T>(a.weights[a.fisher.rows]));
  const T count = divisor<T>(a.counters);
  R* s_row = row<R>(a.s_ring, ring.free_slot());
  R* y_row = row<R>(a.y_ring, ring.free_slot());
  auto factors = pair_rows<R>(a.s_ring, ring);
  factors.insert(factors.end(), {s_row, y_row});
  PartialSums partial(size, ring.pairs + kWords);
  const auto chunk = [&](int64_t index, int64_t begin, int64_t end) {
    double* sums = partial.of(index);
    double& nonfinite = sums[ring.pairs + kNonfinite];
    for_blocks(begin, end, [&](int64_t at, int64_t n) {
      T s[kBlock], y[kBlock];
      load_displacement(a.s, count, at, n, s);
      std::fill_n(y, n, T(0));
      add_combination(gradients, weights, at, n, y);
      add_combination(image, image_weight, at, n, y);
      nonfinite += store_rounded(s, n, s_row + at) + store_rounded(y, n, y_row + at);
      add_products(factors, at, n, y, sums);
      add_products(momentum, at, n, s, sums + ring.pairs + kMoment);
    });
  };
  for_chunks(parallel_for, size, Order::backward, chunk);

  auto total = partial.total();
  const double* words = total.data() + ring.pairs;
  if (words[kNonfinite] > 0) {
    // Rows hold finite values at all times; a candidate of zeros is never stored.
    std::fill_n(s_row, size, convert<R>(T(0)));
    std::fill_n(y_row, size, convert<R>(T(0)));
    std::fill(total.begin(), total.end(), 0.0);
  }
  scatter_by_slot(total.data(), ring, a.column);
  a.column[ring.free_slot()] = words[kOwnProduct];
  a.column[ring.slots] = words[kSquare];
  a.column[ring.slots + 1] = words[kMoment];
}

template <class T>
void commit(ParallelFor parallel_for, const Commit& a, T) {
  const PairUpdate outcome =
      decide_pair_update(a.counters, a.slots, a.column, a.flags, a.losses, a.monitored, a.rule);
  if (outcome == PairUpdate::none) return;
  const T count = divisor<T>(a.counters);
  T* anchor = static_cast<T*>(a.anchor);
  T* sum = static_cast<T*>(a.iterate_sum);
  T* momentum = static_cast<T*>(a.momentum);
  const auto chunk = [&](int64_t, int64_t begin, int64_t end) {
    if (outcome == PairUpdate::reset) {
      a.params.store(begin, end - begin, anchor + begin);
      if (momentum != nullptr) std::fill(momentum + begin, momentum + end, T(0));
    }
    if (moves_anchor(outcome)) {
      for (int64_t k = begin; k < end; ++k) anchor[k] = sum[k] / count;
    }
    std::fill(sum + begin, sum + end, T(0));
  };
  for_chunks(parallel_for, a.params.size(), Order::forward, chunk);
  record_pair_update(outcome, a.slots, a.column, a.monitored, a.rule, a.gram, a.moments, a.losses,
                     a.counters);
}

}  // namespace

void curvature_pass_a(ParallelFor parallel_for, const PassA& a) {
  with_vector_type(a.s.dtype, [&](auto t) {
    with_ring_type<decltype(t)>(a.fisher.dtype, [&](auto f) { pass_a(parallel_for, a, t, f); });
  });
}

void curvature_pass_b(ParallelFor parallel_for, const PassB& a) {
  with_vector_type(a.s.dtype, [&](auto t) {
    with_ring_type<decltype(t)>(a.fisher.dtype, [&](auto f) {
      with_ring_type<decltype(t)>(a.s_ring.dtype,
                                  [&](auto r) { pass_b(parallel_for, a, t, f, r); });
    });
  });
}

void curvature_commit(ParallelFor parallel_for, const Commit& a) {
  with_vector_type(a.dtype, [&](auto t) { commit(parallel_for, a, t); });
}

}  // namespace adaqn::cpu
