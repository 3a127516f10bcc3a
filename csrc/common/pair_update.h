// Reset, store or skip: section 3 of the paper.
#pragma once

#include <cmath>

#include "acceptance.h"
#include "recursion.h"
#include "ring.h"

namespace adaqn {

enum class PairUpdate : int {
  none,   ///< the step was dropped, or no iterate was summed: nothing happens
  first,  ///< no anchor yet: the average becomes the anchor
  reset,  ///< the loss has grown: drop pairs and gradients, the parameters go back to the anchor
  store,  ///< enough curvature: the candidate counts, the average becomes the anchor
  skip,   ///< the candidate is forgotten
};

struct PairUpdateRule {
  double min_curvature;  ///< smallest s.y / y.y that is stored
  double max_increase;   ///< largest ratio of monitored losses that is no reset
  double max_growth;     ///< largest ratio of the scalar initial matrices of two successive pairs
};

/// Whether the averaged iterate becomes the anchor.
ADAQN_HOST_DEVICE inline bool moves_anchor(PairUpdate outcome) {
  return outcome == PairUpdate::first || outcome == PairUpdate::store;
}

/// column[i] = s_i.y of the candidate y by slot, its own s.y in the free slot; then y.y and s.m.
/// `flags` are the words of namespace flag of the step before.  `monitored` is the loss f_n at the
/// averaged iterate, or null without a monitor.
ADAQN_HOST_DEVICE inline PairUpdate decide_pair_update(const int64_t* counters, int slots,
                                                       const double* column, const double* flags,
                                                       const double* losses,
                                                       const double* monitored,
                                                       const PairUpdateRule& rule) {
  if (!step_is_accepted(flags, counters) || counters[counter::iterates] == 0)
    return PairUpdate::none;
  if (counters[counter::anchored] == 0) return PairUpdate::first;
  if (monitored != nullptr) {
    const bool grown = *monitored > rule.max_increase * losses[loss::anchor];
    if (grown || !is_finite(*monitored)) return PairUpdate::reset;
  }
  const double ratio = column[PairRing(counters, slots).free_slot()] / column[slots];
  return is_finite(ratio) && ratio > rule.min_curvature ? PairUpdate::store : PairUpdate::skip;
}

ADAQN_HOST_DEVICE inline void count_pair_update(int64_t* counters, int slots, PairUpdate outcome) {
  if (outcome == PairUpdate::none) return;
  counters[counter::iterates] = 0;
  counters[counter::anchored] = 1;
  if (outcome == PairUpdate::skip) ++counters[counter::skipped];
  if (outcome == PairUpdate::store) {
    ++counters[counter::stored];
    if (counters[counter::pairs] < slots - 1) {
      ++counters[counter::pairs];
    } else {
      counters[counter::oldest_pair] = PairRing(counters, slots).slot(1);
    }
  }
  if (outcome == PairUpdate::reset) {
    ++counters[counter::resets];
    counters[counter::pairs] = 0;
    counters[counter::gradients] = 0;
    counters[counter::next_gradient] = 0;
  }
}

/// The y.y that is kept of a candidate: at least so large that gamma = s.y / y.y is at most
/// max_growth times that of the newest pair.
ADAQN_HOST_DEVICE inline double kept_square(const PairRing& ring, const double* column,
                                            const double* gram, double max_growth) {
  const double square = column[ring.slots];
  if (ring.pairs == 0) return square;
  const double least = column[ring.free_slot()] / (max_growth * scalar_initial_matrix(gram, ring));
  return square < least ? least : square;
}

/// What a candidate that is not stored says of gamma, where its growth is bounded: the y.y of the
/// newest pair, so large that gamma is at most s.y / y.y of the candidate.
ADAQN_HOST_DEVICE inline double squeezed_square(const PairRing& ring, const double* column,
                                                const double* gram) {
  const int newest = ring.slot(ring.pairs - 1);
  const double square = gram[ring.slots * ring.slots + newest];
  const double ratio = column[ring.free_slot()] / column[ring.slots];
  const double least = gram[newest * ring.slots + newest] / ratio;
  return ratio > 0 && is_finite(least) && square < least ? least : square;
}

/// Every word that a pair update changes: a stored candidate's column of gram and its s.m, losses,
/// counters.
ADAQN_HOST_DEVICE inline void record_pair_update(PairUpdate outcome, int slots,
                                                 const double* column, const double* monitored,
                                                 const PairUpdateRule& rule, double* gram,
                                                 double* moments, double* losses,
                                                 int64_t* counters) {
  if (outcome == PairUpdate::store) {
    const PairRing ring(counters, slots);
    const int free = ring.free_slot();
    const double square = kept_square(ring, column, gram, rule.max_growth);
    for (int i = 0; i < slots; ++i) gram[i * slots + free] = column[i];
    gram[slots * slots + free] = square;
    moments[free] = column[slots + 1];
  }
  if (outcome == PairUpdate::skip && is_finite(rule.max_growth)) {
    const PairRing ring(counters, slots);
    if (ring.pairs > 0) {
      gram[slots * slots + ring.slot(ring.pairs - 1)] = squeezed_square(ring, column, gram);
    }
  }
  if (monitored != nullptr && outcome != PairUpdate::none) losses[loss::monitored] = *monitored;
  if (moves_anchor(outcome)) {
    losses[loss::anchor] = monitored != nullptr ? *monitored : NAN;
  }
  count_pair_update(counters, slots, outcome);
}

}  // namespace adaqn
