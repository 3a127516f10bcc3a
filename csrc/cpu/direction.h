// The three passes of a step.  Their mathematics is in section 3 of each function's counterpart in
// adaqn_cuda/reference.py; all sizes and dtypes have been checked by the caller.
#pragma once

#include <vector>

#include "parallel.h"
#include "rows.h"
#include "scattered.h"

namespace adaqn::cpu {

/// The gradient to descend: tensors / scale, negated to maximize.
struct Gradient {
  Scattered tensors;
  bool scaled;
  double scale;
  bool maximize;
};

/// The rates of elements up to `end`, from the end of the run before.
struct Rates {
  int64_t end;
  double lr;
  double weight_decay;
};

struct Pass1 {
  const Gradient& gradient;
  Dtype dtype;
  Matrix s_ring;
  const int64_t* counters;
  double found_inf;
  double* projections;
};

struct Pass2 {
  const Gradient& gradient;
  Dtype dtype;
  Matrix y_ring;
  const double* gram;
  const int64_t* counters;
  const double* projections;
  double keep;
  double add;
  double eps;
  void* accumulator;  ///< null: the scalar initial matrix
  Matrix fisher;
  void* direction;
  double* images;
};

struct Pass3 {
  const Scattered& params;
  Dtype dtype;
  Matrix s_ring;
  const double* gram;
  const double* projections;
  const double* images;
  const void* direction;
  const std::vector<Rates>& rates;
  int64_t fisher_size;
  void* iterate_sum;
  int64_t* counters;
};

void direction_pass1(ParallelFor parallel_for, const Pass1& a);
void direction_pass2(ParallelFor parallel_for, const Pass2& a);
void direction_pass3(ParallelFor parallel_for, const Pass3& a);

}  // namespace adaqn::cpu
