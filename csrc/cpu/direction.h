// The three passes of a step.  Their mathematics is in each function's counterpart in
// adaqn_cuda/reference/direction.py; all sizes and dtypes have been checked by the caller.
#pragma once

#include <vector>

#include "averages.h"
#include "gradient.h"
#include "parallel.h"
#include "rates.h"
#include "rows.h"

namespace adaqn::cpu {

struct Pass1 {
  const Gradient& gradient;
  Dtype dtype;
  Matrix s_ring;
  const int64_t* counters;
  double found_inf;
  double beta;
  const double* moments;
  double* projections;
};

struct Pass2 {
  const Gradient& gradient;
  Dtype dtype;
  Matrix y_ring;
  const double* gram;
  const int64_t* counters;
  const double* projections;
  Averages averages;
  bool identity;  ///< another initial matrix is applied between this pass and direction_images
  Matrix fisher;  ///< without rows: gradients are not kept
  void* direction;
  double* images;
};

struct Images {
  Dtype dtype;
  const void* direction;
  Matrix y_ring;
  const double* projections;
  const int64_t* counters;
  double* images;
};

struct Pass3 {
  const Scattered& params;
  const Scattered& gradients;  ///< of which it matters which are there
  Dtype dtype;
  Matrix s_ring;
  const double* gram;
  const double* projections;
  const double* images;
  void* direction;
  double beta;
  double max_direction;
  const std::vector<Rates>& rates;
  int64_t fisher_size;
  void* iterate_sum;  ///< null: iterates are not summed
  double* moments;
  int64_t* counters;
};

void direction_pass1(ParallelFor parallel_for, const Pass1& a);
void direction_pass2(ParallelFor parallel_for, const Pass2& a);
void direction_images(ParallelFor parallel_for, const Images& a);
void direction_pass3(ParallelFor parallel_for, const Pass3& a);

}  // namespace adaqn::cpu
