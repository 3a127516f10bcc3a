// The ring of curvature pairs: `slots` rows, of which one is always free for the candidate.
#pragma once

#include "layout.h"

namespace adaqn {

/// Where the pairs are.  Age 0 is the oldest pair, age `pairs` - 1 the newest.
struct PairRing {
  int oldest;
  int pairs;
  int slots;

  ADAQN_HOST_DEVICE PairRing(const int64_t* counters, int slots_)
      : oldest(static_cast<int>(counters[counter::oldest_pair])),
        pairs(static_cast<int>(counters[counter::pairs])),
        slots(slots_) {}

  /// Row of the pair of an age in 0..slots.
  ADAQN_HOST_DEVICE int slot(int age) const {
    const int row = oldest + age;
    return row < slots ? row : row - slots;
  }

  /// The row that takes the candidate.
  ADAQN_HOST_DEVICE int free_slot() const { return slot(pairs); }
};

}  // namespace adaqn
