// The update of the parameters, with which every step ends.
#pragma once

#include "control.cuh"
#include "launch.cuh"
#include "segments.cuh"

namespace adaqn::cuda {

/// Rates of the groups of one table, by value, or where to find them.
struct TableRates {
  double lr[kTableGroups], weight_decay[kTableGroups];
  const double *lr_tensor, *weight_decay_tensor;  // at the table's first group; null: by value

  __device__ __forceinline__ double lr_of(int group) const {
    return lr_tensor ? lr_tensor[group] : lr[group];
  }
  __device__ __forceinline__ double weight_decay_of(int group) const {
    return weight_decay_tensor ? weight_decay_tensor[group] : weight_decay[group];
  }
};

inline TableRates rates_of(const Rates& rates, const TableRange& range, const Parameters& list) {
  const int32_t groups = list.tensors[range.next_tensor - 1].group - range.first_group + 1;
  TableRates result{};
  if (rates.lr_tensor) result.lr_tensor = rates.lr_tensor + range.first_group;
  if (rates.weight_decay_tensor) {
    result.weight_decay_tensor = rates.weight_decay_tensor + range.first_group;
  }
  for (int32_t k = 0; k < groups && k < kTableGroups; ++k) {
    if (!rates.lr_tensor) result.lr[k] = rates.lr[range.first_group + k];
    if (!rates.weight_decay_tensor) {
      result.weight_decay[k] = rates.weight_decay[range.first_group + k];
    }
  }
  return result;
}

/// w and, where there is one, the sum of iterates at packs, and the rates there.  Loaded before
/// the direction, to be in flight beside it.
template <class T, int W>
struct IterateAt {
  T w[W], sum[W], rate, shrink;

  /// `factor` shortens the direction.
  template <class At, int Capacity>
  __device__ __forceinline__ void load(const Cursor<Capacity>& cursor, const State& state,
                                       const TableRates& rates, double factor, const At& at) {
    load_param(cursor, at, w);
    if (state.iterate_sum) cuda::load(static_cast<const T*>(state.iterate_sum), at, sum);
    const int group = cursor.table.group[cursor.segment];
    const double lr = rates.lr_of(group);
    rate = T(lr * factor);
    shrink = T(1 - lr * rates.weight_decay_of(group));
  }

  /// w_sum += w;  w = (1 - lr weight_decay) w - lr factor p where it moves; in memory.
  template <class At, int Capacity>
  __device__ __forceinline__ void descend(const Cursor<Capacity>& cursor, const State& state,
                                          const At& at, const T (&p)[W]) {
    if (state.iterate_sum) {
#pragma unroll
      for (int j = 0; j < W; ++j) sum[j] += w[j];
      store(static_cast<T*>(state.iterate_sum), at, sum);
    }
    if (!cursor.moves()) return;
#pragma unroll
    for (int j = 0; j < W; ++j) w[j] = shrink * w[j] - rate * p[j];
    store_param(cursor, at, w);
  }
};

}  // namespace adaqn::cuda
