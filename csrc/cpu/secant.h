// L-BFGS with step control.  The mathematics is in each function's counterpart in
// adaqn_cuda/reference/secant.py; all sizes and dtypes have been checked by the caller.
#pragma once

#include "gradient.h"
#include "parallel.h"
#include "rows.h"

namespace adaqn::cpu {

struct Measure {
  const Gradient& gradient;
  Dtype dtype;
  double loss;
  const void* direction;
  void* trial;
  double* words;
};

struct SecantPair {
  Dtype dtype;
  const void* trial;
  const void* direction;
  double absolute;
  double relative;
  bool self_scaled;
  void* gradient;
  Matrix s_ring;
  Matrix y_ring;
  double* gram;
  double* scales;
  double* projections;
  int64_t* counters;
  double* words;
};

struct Residual {
  Dtype dtype;
  const void* gradient;
  Matrix y_ring;
  const double* gram;
  const int64_t* counters;
  const double* projections;
  const double* words;
  bool identity;  ///< another initial matrix is applied between this pass and direction_images
  void* residual;
  double* images;
};

struct Combine {
  Dtype dtype;
  const void* gradient;
  Matrix s_ring;
  const double* gram;
  const double* scales;
  const int64_t* counters;
  const double* projections;
  const double* images;
  const void* residual;
  double lr;
  double first;
  void* direction;
  double* words;
};

struct Move {
  const Scattered& params;
  Dtype dtype;
  const void* origin;
  const void* direction;
  double limit;
  const double* words;
};

void secant_measure(ParallelFor parallel_for, const Measure& a);
void secant_keep(ParallelFor parallel_for, const Scattered& params, Dtype dtype,
                 const double* words, void* origin);
void secant_pair(ParallelFor parallel_for, const SecantPair& a);
void secant_residual(ParallelFor parallel_for, const Residual& a);
void secant_combine(ParallelFor parallel_for, const Combine& a);
void secant_move(ParallelFor parallel_for, const Move& a);

}  // namespace adaqn::cpu
