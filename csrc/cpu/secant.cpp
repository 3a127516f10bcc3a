#include "secant.h"

#include <algorithm>
#include <cmath>

#include "../common/secant.h"
#include "dispatch.h"
#include "pairs.h"
#include "triangle.h"

namespace adaqn::cpu {
namespace {

/// Elements of one task: enough of a row to read it at the memory's speed, and enough tasks for all
/// threads.  Independent of their number, and with it every sum.
int64_t chunk_length(int64_t size) {
  constexpr int64_t tasks = 16, step = 512;
  const int64_t steps = std::max<int64_t>((size + tasks * step - 1) / (tasks * step), 1);
  return std::min(steps * step, kBlock);
}

/// The largest of one number per chunk; infinite if any is not finite.
double largest_of(const std::vector<double>& numbers) {
  double largest = 0;
  for (const double number : numbers) {
    largest = number <= largest ? largest : is_finite(number) ? number : INFINITY;
  }
  return largest;
}

/// max |x|; infinite unless all of x is finite.
template <class T>
inline double largest(const T* x, int64_t n) {
  T most = 0;
  int32_t nonfinite = 0;
#pragma omp simd reduction(max : most) reduction(+ : nonfinite)
  for (int64_t k = 0; k < n; ++k) {
    const T size = x[k] < 0 ? -x[k] : x[k];
    most = size > most ? size : most;
    nonfinite += !is_finite(x[k]);
  }
  return nonfinite > 0 ? static_cast<double>(INFINITY) : static_cast<double>(most);
}

/// x.y in double.
template <class T>
inline double wide_product(const T* x, const T* y, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < n; ++k) sum += static_cast<double>(x[k]) * static_cast<double>(y[k]);
  return sum;
}

// ---------------------------------------------------------------- an evaluation

template <class T>
void measure(ParallelFor parallel_for, const Measure& a, T) {
  enum : int { kSlope, kSum, kNonfinite, kSums };
  const int64_t size = a.gradient.tensors.size();
  const T* direction = static_cast<const T*>(a.direction);
  T* trial = static_cast<T*>(a.trial);
  PartialSums partial(size, kSums);
  std::vector<double> most(static_cast<size_t>(chunk_count(size)));
  const auto chunk = [&](int64_t index, int64_t begin, int64_t end) {
    double* sums = partial.of(index);
    const int64_t n = end - begin;
    T* g = trial + begin;
    load_gradient(a.gradient, T(1), begin, n, g);
    double sum = 0;
    int32_t nonfinite = 0;
#pragma omp simd reduction(+ : sum, nonfinite)
    for (int64_t k = 0; k < n; ++k) {
      sum += g[k] < 0 ? -static_cast<double>(g[k]) : static_cast<double>(g[k]);
      nonfinite += !is_finite(g[k]);
    }
    sums[kSlope] += wide_product(g, direction + begin, n);
    sums[kSum] += sum;
    sums[kNonfinite] += nonfinite;
    most[index] = largest(g, n);
  };
  for_chunks(parallel_for, size, Order::forward, chunk);
  const auto total = partial.total();
  a.words[word::trial_loss] = a.gradient.maximize ? -a.loss : a.loss;
  a.words[word::trial_slope] = total[kSlope];
  a.words[word::trial_max] = largest_of(most);
  a.words[word::trial_sum] = total[kSum];
  a.words[word::trial_nonfinite] = total[kNonfinite];
}

template <class T>
void keep(ParallelFor parallel_for, const Scattered& params, T* origin) {
  const auto chunk = [&](int64_t, int64_t begin, int64_t end) {
    params.load(begin, end - begin, origin + begin);
  };
  for_chunks(parallel_for, params.size(), Order::forward, chunk);
}

template <class T>
void move(ParallelFor parallel_for, const Move& a, T) {
  const T* origin = static_cast<const T*>(a.origin);
  const T* direction = static_cast<const T*>(a.direction);
  const double* words = a.words;
  const bool moves = leaves_origin(words[word::step], words[word::slope], a.limit);
  const T step = static_cast<T>(words[word::step]);
  const auto chunk = [&](int64_t, int64_t begin, int64_t end) {
    for_blocks(begin, end, [&](int64_t at, int64_t n) {
      if (!moves) return a.params.store(at, n, origin + at);
      T w[kBlock];
      for (int64_t k = 0; k < n; ++k) w[k] = origin[at + k] + step * direction[at + k];
      a.params.store(at, n, w);
    });
  };
  for_chunks(parallel_for, a.params.size(), Order::forward, chunk);
}

// ---------------------------------------------------------------- the pair

/// Words of the pair's sums behind s_i.y and s_i.g of the pairs.
enum : int { kCurvature, kSquare, kLength, kOwnSlope, kGradientSquare, kNonzero, kBroken, kWords };

/// s = t p and y = g' - g, rounded to their rows and in place; returns elements that are not
/// finite.
template <class T, class R>
inline int32_t store_difference(T step, const T* p, const T* trial, const T* gradient, int64_t n,
                                R* s_row, R* y_row, T* s, T* y) {
  int32_t broken = 0;
#pragma omp simd reduction(+ : broken)
  for (int64_t k = 0; k < n; ++k) {
    s_row[k] = convert<R>(step * p[k]);
    y_row[k] = convert<R>(trial[k] - gradient[k]);
    s[k] = convert<T>(s_row[k]);
    y[k] = convert<T>(y_row[k]);
    broken += !is_finite(s[k]) + !is_finite(y[k]);
  }
  return broken;
}

template <class T, class R>
std::vector<double> pair_sums(ParallelFor parallel_for, const SecantPair& a, const PairRing& ring,
                              T, R) {
  const int64_t size = a.s_ring.columns, length = chunk_length(size);
  const T* trial = static_cast<const T*>(a.trial);
  const T* direction = static_cast<const T*>(a.direction);
  T* gradient = static_cast<T*>(a.gradient);
  R* s_row = row<R>(a.s_ring, ring.free_slot());
  R* y_row = row<R>(a.y_ring, ring.free_slot());
  const auto rows = pair_rows<R>(a.s_ring, ring);
  const T step = static_cast<T>(a.words[word::step]);
  PartialSums partial(size, 2 * ring.pairs + kWords, length);
  const auto chunk = [&](int64_t index, int64_t begin, int64_t end) {
    double* sums = partial.of(index);
    double* words = sums + 2 * ring.pairs;
    const int64_t n = end - begin;
    T s[kBlock], y[kBlock];
    words[kBroken] += store_difference(step, direction + begin, trial + begin, gradient + begin, n,
                                       s_row + begin, y_row + begin, s, y);
    std::copy_n(trial + begin, n, gradient + begin);
    const T* g = gradient + begin;
    add_two_products(rows, begin, n, y, g, sums, sums + ring.pairs);
    words[kCurvature] += wide_product(s, y, n);
    words[kSquare] += sum_of_squares(y, n);
    words[kLength] += sum_of_squares(s, n);
    words[kOwnSlope] += wide_product(s, g, n);
    words[kGradientSquare] += sum_of_squares(g, n);
    for (int64_t k = 0; k < n; ++k) words[kNonzero] += g[k] != 0;
  };
  for_chunks(parallel_for, size, Order::forward, chunk, length);
  auto total = partial.total();
  if (total[2 * ring.pairs + kBroken] > 0) {
    // Rows hold finite values at all times; a candidate of zeros is never stored.
    std::fill_n(s_row, size, convert<R>(T(0)));
    std::fill_n(y_row, size, convert<R>(T(0)));
    std::fill_n(total.begin(), ring.pairs, 0.0);
    for (const int word : {kCurvature, kSquare, kLength}) total[2 * ring.pairs + word] = 0;
  }
  return total;
}

/// From the sums: whether the candidate is stored, and all that follows; u_i = s_i.q.
void record(const SecantPair& a, const PairRing& ring, const std::vector<double>& sums) {
  const double* words = sums.data() + 2 * ring.pairs;
  std::vector<double> column(static_cast<size_t>(ring.slots) + 1);
  scatter_by_slot(sums.data(), ring, column.data());
  column[ring.free_slot()] = words[kCurvature];
  column[ring.slots] = words[kSquare];
  const bool finite = std::all_of(column.begin(), column.end(), is_finite<double>);
  const PairRule rule{a.absolute, a.relative, a.self_scaled};
  const Candidate candidate{words[kCurvature], words[kSquare], words[kLength],
                            finite && words[kBroken] == 0};
  const bool store = stores_pair(rule, candidate, a.words);
  scatter_by_slot(sums.data() + ring.pairs, ring, a.projections);
  if (store) {
    keep_column(column.data(), ring, a.gram);
    a.projections[ring.free_slot()] = words[kOwnSlope];
  }
  for (int i = 0; i < ring.slots; ++i) a.projections[i] = -finite_or_zero(a.projections[i]);
  double* flags = a.projections + ring.slots;
  flags[flag::nonfinite] = a.words[word::trial_nonfinite];
  flags[flag::nonzero] = words[kNonzero];
  flags[flag::square] = words[kGradientSquare];
  record_pair(rule, candidate, store, ring.slots, a.scales, a.counters, a.words);
  // A full ring has let go of the pair that is the free row now.
  a.projections[PairRing(a.counters, ring.slots).free_slot()] = 0;
}

template <class T, class R>
void pair(ParallelFor parallel_for, const SecantPair& a, T t, R r) {
  const PairRing ring(a.counters, static_cast<int>(a.s_ring.rows));
  if (turns(a.words, turn::accept)) {
    record(a, ring, pair_sums(parallel_for, a, ring, t, r));
    return;
  }
  a.projections[ring.slots + flag::nonfinite] += 1;
  if (turns(a.words, turn::forget)) {
    std::fill_n(a.projections, ring.slots, 0.0);
    record_pair({}, {}, false, ring.slots, a.scales, a.counters, a.words);
  }
}

// ---------------------------------------------------------------- the direction

template <class T, class R>
void residual(ParallelFor parallel_for, const Residual& a, T, R) {
  if (turns(a.words, turn::refuse)) return;
  const PairRing ring(a.counters, static_cast<int>(a.y_ring.rows));
  const int64_t size = a.y_ring.columns, length = chunk_length(size);
  const auto rows = pair_rows<R>(a.y_ring, ring);
  auto minus_a = by_age<T>(solve_backward(a.gram, ring, a.projections), ring);
  for (T& number : minus_a) number = -number;
  const T* gradient = static_cast<const T*>(a.gradient);
  T* residual = static_cast<T*>(a.residual);
  PartialSums partial(size, ring.pairs, length);
  const auto chunk = [&](int64_t index, int64_t begin, int64_t end) {
    const int64_t n = end - begin;
    T* r = residual + begin;
    for (int64_t k = 0; k < n; ++k) r[k] = -gradient[begin + k];
    add_combination(rows, minus_a, begin, n, r);
    if (!a.identity) add_products(rows, begin, n, r, partial.of(index));
  };
  for_chunks(parallel_for, size, Order::backward, chunk, length);
  if (a.identity) return;
  auto total = partial.total();
  std::transform(total.begin(), total.end(), total.begin(), finite_or_zero);
  scatter_by_slot(total.data(), ring, a.images);
}

/// p = factor r + S c.
struct Coefficients {
  double factor;
  std::vector<double> c;  ///< by slot
};

/// R^T c = diag(R) a sigma / sigma_i - sigma gamma z, as common/secant.h has it.
Coefficients coefficients_of(const Combine& a, const PairRing& ring) {
  auto right = solve_backward(a.gram, ring, a.projections);
  double sigma = 1;
  for (int age = ring.pairs - 1; age >= 0; --age) {
    const int i = ring.slot(age);
    right[i] *= sigma * a.gram[i * int64_t{ring.slots} + i];
    sigma *= a.scales[i];
  }
  const double factor = sigma * a.words[word::gamma];
  for (int age = 0; age < ring.pairs; ++age) {
    const int i = ring.slot(age);
    right[i] -= factor * a.images[i];
  }
  return {factor, solve_forward(a.gram, ring, right)};
}

/// The direction, with g.p and max |p|, and the first step along it.
template <class T, class R>
void combine(ParallelFor parallel_for, const Combine& a, T, R) {
  if (turns(a.words, turn::refuse)) return;
  const PairRing ring(a.counters, static_cast<int>(a.s_ring.rows));
  const Coefficients coefficients = coefficients_of(a, ring);
  const int64_t size = a.s_ring.columns, length = chunk_length(size);
  const auto rows = pair_rows<R>(a.s_ring, ring);
  const auto c = by_age<T>(coefficients.c, ring);
  const T factor = static_cast<T>(coefficients.factor);
  const T* r = static_cast<const T*>(a.residual);
  const T* gradient = static_cast<const T*>(a.gradient);
  T* direction = static_cast<T*>(a.direction);
  PartialSums partial(size, 1, length);
  std::vector<double> most(static_cast<size_t>(chunk_count(size, length)));
  const auto chunk = [&](int64_t index, int64_t begin, int64_t end) {
    const int64_t n = end - begin;
    T* p = direction + begin;
    for (int64_t k = 0; k < n; ++k) p[k] = factor * r[begin + k];
    add_combination(rows, c, begin, n, p);
    *partial.of(index) += wide_product(gradient + begin, p, n);
    most[index] = largest(p, n);
  };
  for_chunks(parallel_for, size, Order::forward, chunk, length);
  a.words[word::slope] = partial.total()[0];
  a.words[word::direction_max] = largest_of(most);
  a.words[word::step] = first_step(a.lr, a.first, a.counters, a.words);
}

}  // namespace

void secant_measure(ParallelFor parallel_for, const Measure& a) {
  with_vector_type(a.dtype, [&](auto t) { measure(parallel_for, a, t); });
}

void secant_keep(ParallelFor parallel_for, const Scattered& params, Dtype dtype,
                 const double* words, void* origin) {
  if (!turns(words, turn::accept)) return;
  with_vector_type(dtype,
                   [&](auto t) { keep(parallel_for, params, static_cast<decltype(t)*>(origin)); });
}

void secant_move(ParallelFor parallel_for, const Move& a) {
  with_vector_type(a.dtype, [&](auto t) { move(parallel_for, a, t); });
}

void secant_pair(ParallelFor parallel_for, const SecantPair& a) {
  with_vector_type(a.dtype, [&](auto t) {
    with_ring_type<decltype(t)>(a.s_ring.dtype, [&](auto r) { pair(parallel_for, a, t, r); });
  });
}

void secant_residual(ParallelFor parallel_for, const Residual& a) {
  with_vector_type(a.dtype, [&](auto t) {
    with_ring_type<decltype(t)>(a.y_ring.dtype, [&](auto r) { residual(parallel_for, a, t, r); });
  });
}

void secant_combine(ParallelFor parallel_for, const Combine& a) {
  with_vector_type(a.dtype, [&](auto t) {
    with_ring_type<decltype(t)>(a.s_ring.dtype, [&](auto r) { combine(parallel_for, a, t, r); });
  });
}

}  // namespace adaqn::cpu
