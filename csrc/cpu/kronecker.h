// The Kronecker-factored initial matrix.  Its mathematics is in adaqn_cuda/reference/kronecker.py;
// all sizes, dtypes and the table have been checked by the caller.
#pragma once

#include <vector>

#include "../common/kronecker.h"
#include "averages.h"
#include "gradient.h"
#include "parallel.h"
#include "rates.h"

namespace adaqn::cpu {

using KroneckerMatrices = std::vector<KroneckerMatrix>;  ///< the rows of the table

struct KroneckerAccumulate {
  const Gradient& gradient;
  Dtype dtype;
  const KroneckerMatrices& matrices;
  KroneckerSchedule schedule;
  Averages averages;    ///< momentum is not touched
  double square_keep;   ///< decay of the average |g|^2
  const double* flags;  ///< words of namespace flag
  const int64_t* counters;
  void* factors;
  void* bases;
  double* square;
  int64_t workers;
};

struct KroneckerApply {
  Dtype dtype;
  const KroneckerMatrices& matrices;
  const int64_t* counters;
  Averages averages;
  int pending;
  bool inverse;
  const void* bases;
  void* x;
  int64_t workers;
};

struct KroneckerStep {
  const Scattered& params;
  Gradient& gradient;  ///< an outlier is divided by its surplus
  Dtype dtype;
  double found_inf;
  const KroneckerMatrices& matrices;
  KroneckerSchedule schedule;
  Averages averages;
  double square_keep;
  const std::vector<Rates>& rates;
  void* factors;
  void* bases;
  double* square;
  double* flags;  ///< words of namespace flag
  int64_t* counters;
  int64_t workers;
};

void kronecker_accumulate(ParallelFor parallel_for, const KroneckerAccumulate& a);
void kronecker_apply(ParallelFor parallel_for, const KroneckerApply& a);
void kronecker_step(ParallelFor parallel_for, const KroneckerStep& a);

}  // namespace adaqn::cpu
