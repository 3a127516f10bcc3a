// Powell's damping (Nocedal & Wright, Procedure 18.2): y = theta y + (1 - theta) B0 s.
#pragma once

#include "portable.h"

namespace adaqn {

/// theta, 1 unless s.y < damping s.B0 s.
ADAQN_HOST_DEVICE inline double damping_factor(double s_y, double s_b0_s, double damping) {
  return s_y < damping * s_b0_s ? (1 - damping) * s_b0_s / (s_b0_s - s_y) : 1.0;
}

}  // namespace adaqn
