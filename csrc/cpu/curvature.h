// The two passes of a pair update over the gradients, and its outcome.
#pragma once

#include "../common/pair_update.h"
#include "parallel.h"
#include "rows.h"
#include "scattered.h"

namespace adaqn::cpu {

/// s = w_n - w_o, formed on the fly.
struct Displacement {
  Dtype dtype;
  const void* iterate_sum;
  const void* anchor;
};

struct PassA {
  Displacement s;
  Matrix fisher;
  const int64_t* counters;
  bool is_explicit;  ///< the candidate y is the gradient itself, not the Fisher product
  double damping;
  const void* image;  ///< B0 s; null without damping
  double* weights;    ///< of the gradients, then of the image
};

struct PassB {
  Displacement s;
  Matrix fisher;
  const int64_t* counters;
  const double* flags;  ///< words of namespace flag
  const double* weights;
  const void* image;     ///< null without damping
  const void* momentum;  ///< null: none
  Matrix s_ring;
  Matrix y_ring;
  double* column;
};

struct Commit {
  const Scattered& params;
  Dtype dtype;
  int slots;
  const double* column;
  const double* flags;      ///< words of namespace flag
  const double* monitored;  ///< null without a monitor
  PairUpdateRule rule;
  double* gram;
  double* moments;
  double* losses;
  void* anchor;
  void* iterate_sum;
  void* momentum;  ///< null: none
  int64_t* counters;
};

void curvature_pass_a(ParallelFor parallel_for, const PassA& a);
void curvature_pass_b(ParallelFor parallel_for, const PassB& a);
void curvature_commit(ParallelFor parallel_for, const Commit& a);

}  // namespace adaqn::cpu
