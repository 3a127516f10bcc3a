#include "iterate.h"

#include "../common/acceptance.h"
#include "dispatch.h"

namespace adaqn::cpu {
namespace {

template <class T>
void swap(ParallelFor parallel_for, const Swap& a, T) {
  const bool accepted = step_is_accepted(a.flags, a.counters);
  const int64_t count = a.counters[counter::iterates] + (accepted ? 1 : 0);
  const T* sum = static_cast<const T*>(a.iterate_sum);
  T* saved = static_cast<T*>(a.saved);
  const auto chunk = [&](int64_t, int64_t begin, int64_t end) {
    for_blocks(begin, end, [&](int64_t at, int64_t n) {
      T w[kBlock];
      a.params.load(at, n, w);
      std::copy_n(w, n, saved + at);
      if (count == 0) return;
      for (int64_t k = 0; k < n; ++k) {
        w[k] = (sum[at + k] + (accepted ? w[k] : T(0))) / static_cast<T>(count);
      }
      a.params.store(at, n, w);
    });
  };
  for_chunks(parallel_for, a.params.size(), Order::forward, chunk);
}

template <class T>
void restore(ParallelFor parallel_for, const Scattered& params, const T* saved) {
  const auto chunk = [&](int64_t, int64_t begin, int64_t end) {
    for_blocks(begin, end, [&](int64_t at, int64_t n) { params.store(at, n, saved + at); });
  };
  for_chunks(parallel_for, params.size(), Order::backward, chunk);
}

}  // namespace

void iterate_swap(ParallelFor parallel_for, const Swap& a) {
  with_vector_type(a.dtype, [&](auto t) { swap(parallel_for, a, t); });
}

void iterate_restore(ParallelFor parallel_for, const Scattered& params, Dtype dtype,
                     const void* saved) {
  with_vector_type(dtype, [&](auto t) {
    restore(parallel_for, params, static_cast<const decltype(t)*>(saved));
  });
}

}  // namespace adaqn::cpu
