#include "diagonal.h"

#include "../common/acceptance.h"
#include "direction.h"
#include "dispatch.h"

namespace adaqn::cpu {
namespace {

template <class T>
void move(ParallelFor parallel_for, const DiagonalStep& a, T) {
  const LookAhead look(a.counters, a.averages.beta);
  const T clip = static_cast<T>(clip_factor(a.flags, a.gradient.max_norm));
  const T correction =
      static_cast<T>(bias_correction(a.counters, a.averages.keep, a.averages.correct_bias));
  const auto chunk = [&](int64_t, int64_t begin, int64_t end) {
    for_blocks(a.gradient.tensors, begin, end, [&](int64_t at, int64_t n, bool present) {
      if (!present) return;
      T g[kBlock], p[kBlock], w[kBlock];
      load_gradient(a.gradient, clip, at, n, g);
      if (a.averages.momentum != nullptr) {
        blend(a.averages, look, g, at, n, p);
      } else {
        std::copy_n(g, n, p);
      }
      if (a.averages.accumulator != nullptr) {
        scale_by_diagonal(a.averages, correction, g, p, at, n, p);
      }
      a.params.load(at, n, w);
      descend(a.rates, 1, at, n, p, w);
      a.params.store(at, n, w);
    });
  };
  for_chunks(parallel_for, a.params.size(), Order::backward, chunk);
}

}  // namespace

void diagonal_step(ParallelFor parallel_for, const DiagonalStep& a) {
  const Matrix no_pairs{nullptr, a.dtype, 0, a.params.size()};
  direction_pass1(parallel_for, {a.gradient, a.dtype, no_pairs, a.counters, a.found_inf,
                                 a.averages.beta, nullptr, a.flags});
  const bool accepted = step_is_accepted(a.flags, a.counters);
  if (accepted) with_vector_type(a.dtype, [&](auto t) { move(parallel_for, a, t); });
  count_step(a.counters, a.flags, accepted, 1);
}

}  // namespace adaqn::cpu
