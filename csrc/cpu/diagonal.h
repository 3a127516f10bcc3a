// A whole step without pairs.
#pragma once

#include <vector>

#include "averages.h"
#include "gradient.h"
#include "parallel.h"
#include "rates.h"

namespace adaqn::cpu {

struct DiagonalStep {
  const Scattered& params;
  const Gradient& gradient;
  Dtype dtype;
  double found_inf;
  Averages averages;
  const std::vector<Rates>& rates;
  double* flags;  ///< words of namespace flag
  int64_t* counters;
};

void diagonal_step(ParallelFor parallel_for, const DiagonalStep& a);

}  // namespace adaqn::cpu
