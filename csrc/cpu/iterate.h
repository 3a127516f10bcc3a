// The averaged iterate in the parameters' place, and back.
#pragma once

#include "parallel.h"
#include "scattered.h"

namespace adaqn::cpu {

struct Swap {
  const Scattered& params;
  Dtype dtype;
  const void* iterate_sum;
  const double* flags;  ///< words of namespace flag
  const int64_t* counters;
  void* saved;
};

void iterate_swap(ParallelFor parallel_for, const Swap& a);
void iterate_restore(ParallelFor parallel_for, const Scattered& params, Dtype dtype,
                     const void* saved);

}  // namespace adaqn::cpu
