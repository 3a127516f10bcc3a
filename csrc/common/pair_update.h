// Reset, store or skip: section 3 of the paper.
#pragma once

#include <cmath>

#include "ring.h"

namespace adaqn {

enum class PairUpdate : int {
  none,   ///< no iterate was summed: nothing happens
  first,  ///< no anchor yet: the average becomes the anchor
  reset,  ///< the loss has grown: drop pairs and gradients, the parameters go back to the anchor
  store,  ///< enough curvature: the candidate counts, the average becomes the anchor
  skip,   ///< the candidate is forgotten
};

struct PairUpdateRule {
  double min_curvature;  ///< smallest s.y / y.y that is stored
  double max_increase;   ///< largest ratio of monitored losses that is no reset
};

/// Whether the averaged iterate becomes the anchor.
ADAQN_HOST_DEVICE inline bool moves_anchor(PairUpdate outcome) {
  return outcome == PairUpdate::first || outcome == PairUpdate::store;
}

/// column[i] = s_i.y of the candidate y by slot, its own s.y in the free slot; then y.y and s.m.
/// `monitored` is the loss f_n at the averaged iterate, or null without a monitor.
ADAQN_HOST_DEVICE inline PairUpdate decide_pair_update(const int64_t* counters, int slots,
                                                       const double* column, const double* losses,
                                                       const double* monitored,
                                                       const PairUpdateRule& rule) {
  if (counters[counter::iterates] == 0) return PairUpdate::none;
  if (counters[counter::anchored] == 0) return PairUpdate::first;
  if (monitored != nullptr) {
    const bool grown = *monitored > rule.max_increase * losses[loss::anchor];
    if (grown || !is_finite(*monitored)) return PairUpdate::reset;
  }
  const double ratio = column[PairRing(counters, slots).free_slot()] / column[slots];
  return is_finite(ratio) && ratio > rule.min_curvature ? PairUpdate::store : PairUpdate::skip;
}

ADAQN_HOST_DEVICE inline void count_pair_update(int64_t* counters, int slots, PairUpdate outcome) {
  counters[counter::iterates] = 0;
  if (outcome != PairUpdate::none) counters[counter::anchored] = 1;
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

/// Every word that a pair update changes: a stored candidate's column of gram and its s.m, losses,
/// counters.
ADAQN_HOST_DEVICE inline void record_pair_update(PairUpdate outcome, int slots,
                                                 const double* column, const double* monitored,
                                                 double* gram, double* moments, double* losses,
                                                 int64_t* counters) {
  if (outcome == PairUpdate::store) {
    const int free = PairRing(counters, slots).free_slot();
    for (int i = 0; i <= slots; ++i) gram[i * slots + free] = column[i];
    moments[free] = column[slots + 1];
  }
  if (monitored != nullptr && outcome != PairUpdate::none) losses[loss::monitored] = *monitored;
  if (moves_anchor(outcome)) {
    losses[loss::anchor] = monitored != nullptr ? *monitored : NAN;
  }
  count_pair_update(counters, slots, outcome);
}

}  // namespace adaqn
