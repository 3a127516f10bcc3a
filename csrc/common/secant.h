// L-BFGS on a deterministic loss, on numbers: the line search's decision, a pair of successive
// iterates, and the first step.  See adaqn_cuda/reference/secant.py.
#pragma once

#include <cmath>
#include <cstdint>

#include "recursion.h"
#include "ring.h"

namespace adaqn {

/// Words of `words` (double): the iterate is w, the trial w + t p.
namespace word {
enum : int {
  step,             ///< t of the trial; 0: it is the iterate itself
  trials,           ///< trials that this search has refused
  iterations,       ///< iterates accepted since the last call
  status,           ///< why the search has stopped, one of namespace stop
  turn,             ///< what comes next, one of namespace turn
  forgotten,        ///< searches in a row that have failed
  trial_loss,       ///< f at the trial
  trial_slope,      ///< g.p at the trial
  trial_max,        ///< max |g| at the trial
  trial_sum,        ///< sum |g| at the trial
  trial_nonfinite,  ///< elements of g at the trial that are not finite
  loss,             ///< f at the iterate
  slope,            ///< g.p at the iterate
  gradient_sum,     ///< sum |g| at the iterate
  direction_max,    ///< max |p|
  gamma,            ///< factor of the initial matrix
  curvature,        ///< s.y of the latest candidate
  square,           ///< y.y of the latest candidate
  taken,            ///< t of the latest iterate; 0: none, or a search has failed since
  made,             ///< iterates accepted since the host looked last
  judged,           ///< trials judged since the host looked last
  count,            ///< number of words
};
}  // namespace word

namespace turn {
enum : int {
  refuse,  ///< the direction stays, the step is shortened
  accept,  ///< the trial is the next iterate
  forget,  ///< no pairs any more, a new direction from the iterate
};
}  // namespace turn

namespace stop {
enum : int { none, gradient, step, loss, slope, search, nonfinite, iterations, evaluations };
}  // namespace stop

ADAQN_HOST_DEVICE inline bool turns(const double* words, int which) {
  return words[word::turn] == which;
}

/// The larger number; NaN if either is.
template <class T>
ADAQN_HOST_DEVICE inline T larger(T x, T y) {
  return y > x || y != y ? y : x;
}

/// What a maximum is recorded as: infinite unless it is finite.
ADAQN_HOST_DEVICE inline double finite_or_infinite(double x) {
  return is_finite(x) ? x : static_cast<double>(INFINITY);
}

// ------------------------------------------------------------------ the line search

struct SearchRule {
  double decrease;  ///< share of the slope's decrease that Armijo's rule asks for
  double noise;     ///< relative noise of a loss
  double tolerance_grad, tolerance_change;
  int64_t max_trials;  ///< of one direction
  int64_t max_iter;
};

/// Bounds of what a refused step is multiplied with; where the loss is not finite, the lower one.
constexpr double kShortest = 0.1, kLongest = 0.5;
/// Without pairs, what the last step is multiplied with to be tried next.
constexpr double kGrowth = 2;

/// What a refused step is multiplied with: where the parabola through f(w), g.p and f(w + t p) has
/// its minimum,  -t g.p / (2 (f(w + t p) - f(w) - t g.p)),  within the bounds.
ADAQN_HOST_DEVICE inline double shortening(const double* words, bool finite) {
  const double drop = words[word::slope] * words[word::step];
  const double factor = -drop / (2 * (words[word::trial_loss] - words[word::loss] - drop));
  if (!finite || !is_finite(factor) || factor < kShortest) return kShortest;
  return factor > kLongest ? kLongest : factor;
}

/// Armijo's rule  f(w + t p) <= f(w) + c t g.p  with c = `decrease`, or by the slopes where both
/// losses are equal up to their noise:  |g(w + t p).p| <= (2 c - 1) g.p.
ADAQN_HOST_DEVICE inline bool falls_enough(const SearchRule& rule, const double* words) {
  const double trial = words[word::trial_loss], loss = words[word::loss];
  const double slope = words[word::slope];
  if (trial <= loss + rule.decrease * words[word::step] * slope) return true;
  return fabs(trial - loss) <= rule.noise * fabs(loss) &&
         fabs(words[word::trial_slope]) <= (2 * rule.decrease - 1) * slope;
}

/// Why the search stops at a trial that it accepts; `fresh`: the trial is where it begins.
ADAQN_HOST_DEVICE inline int stop_at_accepted(const SearchRule& rule, const double* words,
                                              bool fresh, double iterations) {
  const double moved = words[word::step] * words[word::direction_max];
  const double change = fabs(words[word::trial_loss] - words[word::loss]);
  if (words[word::trial_max] <= rule.tolerance_grad) return stop::gradient;
  if (!fresh && moved <= rule.tolerance_change) return stop::step;
  if (!fresh && change < rule.tolerance_change) return stop::loss;
  return iterations >= static_cast<double>(rule.max_iter) ? stop::iterations : stop::none;
}

/// Accept the trial, or shorten the step, or forget the pairs, or stop.
ADAQN_HOST_DEVICE inline void decide(const SearchRule& rule, const int64_t* counters,
                                     double* words) {
  const bool active = words[word::status] == stop::none;
  const bool finite = words[word::trial_nonfinite] == 0 && is_finite(words[word::trial_loss]);
  const bool fresh = words[word::step] == 0;
  const bool descends = fresh || words[word::slope] < 0;
  const bool accept = active && finite && (fresh || (descends && falls_enough(rule, words)));
  const bool refuse = active && !accept && !fresh;
  const bool last = words[word::trials] + 1 >= static_cast<double>(rule.max_trials);
  const bool failed = refuse && (last || !descends);
  const bool forget = failed && counters[counter::pairs] > 0 && words[word::forgotten] == 0;

  const bool made = accept && !fresh;
  const double iterations = words[word::iterations] + made;
  if (active && fresh && !finite) words[word::status] = stop::nonfinite;
  if (accept) words[word::status] = stop_at_accepted(rule, words, fresh, iterations);
  if (failed && !forget) words[word::status] = stop::search;

  words[word::turn] = accept ? turn::accept : forget ? turn::forget : turn::refuse;
  words[word::iterations] = iterations;
  words[word::trials] = refuse && !forget ? words[word::trials] + 1 : 0;
  words[word::forgotten] = made ? 0 : words[word::forgotten] + forget;
  if (made) words[word::taken] = words[word::step];
  if (failed) words[word::taken] = 0;
  words[word::made] += made;
  words[word::judged] += active;
  if (refuse) words[word::step] *= shortening(words, finite);
  if (!accept && words[word::status] != stop::none) words[word::step] = 0;
  if (accept) {
    words[word::loss] = words[word::trial_loss];
    words[word::gradient_sum] = words[word::trial_sum];
  }
}

/// The first step along a direction: lr; while there are no pairs twice the last step taken, or,
/// where there is none, lr first, or lr min(1, 1 / sum |g|) if `first` is zero.  0 once the search
/// has stopped.
ADAQN_HOST_DEVICE inline double first_step(double lr, double first, const int64_t* counters,
                                           const double* words) {
  if (words[word::status] != stop::none) return 0;
  if (counters[counter::pairs] > 0) return lr;
  if (words[word::taken] > 0) return kGrowth * words[word::taken];
  if (first != 0) return lr * first;
  const double inverse = 1 / words[word::gradient_sum];
  return lr * (inverse > 1 ? 1 : inverse);
}

/// Whether the parameters leave the iterate: the slope is at most `limit`.
ADAQN_HOST_DEVICE inline bool leaves_origin(double step, double slope, double limit) {
  return slope <= limit && step != 0;
}

// ------------------------------------------------------------------ a pair

struct PairRule {
  double absolute, relative;  ///< s.y > absolute and s.y > relative |s| |y|, or it is not stored
  bool self_scaled;
};

/// Products of the candidate as stored; all finite: s, y, and s_i.y of the stored pairs.
struct Candidate {
  double s_y, y_y, s_s;
  bool finite;
};

/// Whether the accepted trial's pair is stored.
ADAQN_HOST_DEVICE inline bool stores_pair(const PairRule& rule, const Candidate& candidate,
                                          const double* words) {
  const double s_y = candidate.s_y, y_y = candidate.y_y;
  if (!turns(words, turn::accept) || !candidate.finite) return false;
  if (!is_finite(s_y) || !is_finite(y_y)) return false;
  return s_y > rule.absolute && s_y > rule.relative * sqrt(candidate.s_s * y_y);
}

/// 1/tau = max(1, s.B s / s.y) with s.B s = -t^2 p.g, as p = -H g.
ADAQN_HOST_DEVICE inline double pair_growth(const PairRule& rule, double s_y, const double* words) {
  if (!rule.self_scaled) return 1;
  const double step = words[word::step];
  const double growth = -step * step * words[word::slope] / s_y;
  return is_finite(growth) && growth > 1 ? growth : 1;
}

/// How the ring and its counters move on; the trial was accepted, or the pairs are forgotten.
ADAQN_HOST_DEVICE inline void count_pair(int64_t* counters, int slots, bool store,
                                         const double* words) {
  if (turns(words, turn::accept)) {
    ++counters[counter::accepted];
    ++counters[store ? counter::stored : counter::skipped];
  }
  if (store) {
    if (counters[counter::pairs] < slots - 1) {
      ++counters[counter::pairs];
    } else {
      counters[counter::oldest_pair] = PairRing(counters, slots).slot(1);
    }
  }
  if (turns(words, turn::forget)) {
    ++counters[counter::resets];
    counters[counter::pairs] = counters[counter::oldest_pair] = 0;
  }
}

/// Every number that a candidate changes, beside its column of gram and the projections.
ADAQN_HOST_DEVICE inline void record_pair(const PairRule& rule, const Candidate& candidate,
                                          bool store, int slots, double* scales, int64_t* counters,
                                          double* words) {
  if (turns(words, turn::accept)) {
    words[word::curvature] = candidate.s_y;
    words[word::square] = candidate.y_y;
  }
  if (store) {
    scales[PairRing(counters, slots).free_slot()] = pair_growth(rule, candidate.s_y, words);
    words[word::gamma] = candidate.s_y / candidate.y_y;
  }
  if (turns(words, turn::forget)) words[word::gamma] = 1;
  count_pair(counters, slots, store, words);
}

/// column[i] = s_i.y by slot, the candidate's own s.y in the free slot; then y.y.
ADAQN_HOST_DEVICE inline void keep_column(const double* column, const PairRing& ring,
                                          double* gram) {
  const int free = ring.free_slot();
  for (int i = 0; i <= ring.slots; ++i) gram[i * int64_t{ring.slots} + free] = column[i];
}

}  // namespace adaqn
