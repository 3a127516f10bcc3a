// Whether a step may change anything that lasts, and how the counters move on.
#pragma once

#include "layout.h"

namespace adaqn {

/// `flags` are the words of namespace flag.
ADAQN_HOST_DEVICE inline bool gradient_is_finite(const double* flags) {
  return flags[flag::nonfinite] == 0;
}

/// False for a gradient that is not finite, and for an all-zero gradient before any other.
ADAQN_HOST_DEVICE inline bool step_is_accepted(const double* flags, const int64_t* counters) {
  const bool untouched = counters[counter::gradients] == 0 && counters[counter::anchored] == 0;
  const bool blank = untouched && flags[flag::nonzero] == 0;
  return gradient_is_finite(flags) && !blank;
}

/// The last act of a step; `accepted` is step_is_accepted of the counters before it.
ADAQN_HOST_DEVICE inline void count_step(int64_t* counters, const double* flags, bool accepted,
                                         int64_t fisher_size) {
  if (accepted) {
    if (counters[counter::gradients] < fisher_size) ++counters[counter::gradients];
    counters[counter::next_gradient] = (counters[counter::next_gradient] + 1) % fisher_size;
    ++counters[counter::iterates];
    ++counters[counter::accepted];
  }
  if (!gradient_is_finite(flags)) ++counters[counter::steps_skipped];
}

}  // namespace adaqn
