// Grid barriers for the host emulation; see cuda_runtime.h.

#pragma once

#include "cuda_runtime.h"

namespace cooperative_groups {

struct grid_group {
  void sync() const { emulation::wait(*emulation::grid_barrier); }
};

inline grid_group this_grid() { return {}; }

}  // namespace cooperative_groups
