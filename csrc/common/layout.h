// The words of the control block, in the order of adaqn_cuda/state/layout.py.
#pragma once

#include <cstdint>

#include "portable.h"

namespace adaqn {

/// Words of `counters` (int64).
namespace counter {
enum : int {
  pairs,          ///< curvature pairs stored now, 0..slots-1
  oldest_pair,    ///< ring slot of the oldest pair
  gradients,      ///< gradients in the Fisher ring now; they fill its rows 0..gradients-1
  next_gradient,  ///< Fisher row that the next accepted gradient overwrites
  iterates,       ///< iterates in `iterate_sum` now
  anchored,       ///< 1 once the anchor holds an averaged iterate
  stored,         ///< pair updates that stored a pair, ever
  skipped,        ///< pair updates that failed the curvature test, ever
  resets,         ///< pair updates that dropped the memory, ever
  steps_skipped,  ///< steps dropped for a gradient that is not finite, ever
  accepted,       ///< steps that moved the parameters, ever
  count,          ///< number of words
};
}  // namespace counter

/// Words of `losses` (double).
namespace loss {
enum : int {
  anchor,     ///< monitored loss at the anchor
  monitored,  ///< monitored loss at the latest averaged iterate
  count,      ///< number of words
};
}  // namespace loss

/// Words of `projections` (double) behind its one word per pair slot.
namespace flag {
enum : int {
  nonfinite,  ///< gradient elements that are not finite, plus found_inf
  nonzero,    ///< gradient elements that are not zero
  square,     ///< squared norm of the gradient, before clipping
  count,      ///< number of words
};
}  // namespace flag

}  // namespace adaqn
