#include "diagonal.h"

#include "../common/acceptance.h"
#include "descent.h"
#include "direction.h"
#include "dispatch.h"

namespace adaqn::cpu {
namespace {

template <class T>
void move(ParallelFor parallel_for, const DiagonalStep& a, T) {
  const Descent<T> descent(a.params, a.gradient, a.averages, a.rates, a.flags, a.counters);
  const auto chunk = [&](int64_t, int64_t begin, int64_t end) {
    for_blocks(a.gradient.tensors, begin, end, [&](int64_t at, int64_t n, bool present) {
      if (present) descent.move_along_diagonal(at, n);
    });
  };
  for_chunks(parallel_for, a.params.size(), Order::backward, chunk);
}

}  // namespace

void diagonal_step(ParallelFor parallel_for, const DiagonalStep& a) {
  const Matrix no_pairs{nullptr, a.dtype, 0, a.params.size(), 0};
  direction_pass1(parallel_for,
                  {a.gradient, a.dtype, no_pairs, a.counters, a.found_inf, 0, nullptr, a.flags});
  const bool accepted = step_is_accepted(a.flags, a.counters);
  if (accepted) with_vector_type(a.dtype, [&](auto t) { move(parallel_for, a, t); });
  count_step(a.counters, a.flags, accepted, 1);
}

}  // namespace adaqn::cpu
