// The pair update: y = (1/|F|) sum_j F_j (F_j.s) in two passes over the gradients, or y as given,
// and the decision.
#include "../common/damping.h"
#include "../common/pair_update.h"
#include "control.cuh"
#include "launch.cuh"
#include "load.cuh"

namespace adaqn::cuda {
namespace {

/// Gradients that one block of pass A multiplies with s; grid.y covers them all.
constexpr int kRowsOfBlock = 64;

/// Width of packs of rows of two types.
template <class F, class H>
constexpr int kNarrower = kWidth<F> < kWidth<H> ? kWidth<F> : kWidth<H>;

/// s = w_n - w_o;  `share` is that of one iterate in the average.
template <class T, int W>
__device__ __forceinline__ void load_difference(const State& state, T share, const Pack<W>& at,
                                                T (&s)[W]) {
  T anchor[W];
  load(static_cast<const T*>(state.iterate_sum), at, s);
  load(static_cast<const T*>(state.anchor), at, anchor);
#pragma unroll
  for (int j = 0; j < W; ++j) s[j] = share * s[j] - anchor[j];
}

/// The product of two vectors at a pack.
template <class T, int W>
__device__ __forceinline__ T product(const T (&x)[W], const T (&y)[W]) {
  T sum = 0;
#pragma unroll
  for (int j = 0; j < W; ++j) sum += x[j] * y[j];
  return sum;
}

/// The same with a vector in memory.
template <class T, int W>
__device__ __forceinline__ T product_with(const void* x, const Pack<W>& at, const T (&y)[W]) {
  T elements[W];
  load(static_cast<const T*>(x), at, elements);
  return product(elements, y);
}

/// Rows first..first+count-1 of the Fisher ring.
template <class F>
__device__ __forceinline__ Rows<F> gradient_rows(const State& state, int64_t first, int count) {
  const F* data = static_cast<const F*>(state.fisher.data) + first * state.fisher.stride;
  return {data, state.fisher.stride, 0, count, count};
}

// ------------------------------------------------------------------ pass A

/// Partial sums: F_j.s per gradient in the ring; in row `fisher_size` s.B0 s, if y may be damped.
template <class T, class F>
ADAQN_PASS_KERNEL pass_a_kernel(const __grid_constant__ State state, bool aligned,
                                Partials partials) {
  const int64_t first = int64_t(blockIdx.y) * kRowsOfBlock;
  const int64_t left = state.counters[counter::gradients] - first;
  const void* image = blockIdx.y == 0 ? state.image : nullptr;
  if (left <= 0 && !image) return;
  const T share = share_of_one<T>(state.counters[counter::iterates]);
  const Rows<F> rows =
      gradient_rows<F>(state, first, left < kRowsOfBlock ? int(left) : kRowsOfBlock);
  T* memory = reinterpret_cast<T*>(shared_memory());
  Sums<T> sums(memory, rows.count + 1);
  T s_b0_s = 0;
  visit_flat<T, kWidth<F>>(state.numel, aligned, Order::forward, [&](const auto& at) {
    T s[kPackWidth<decltype(at)>];
    load_difference(state, share, at, s);
    if (image) s_b0_s += product_with(image, at, s);
    add_products<Cache::keep>(rows, at, s, sums, 0);
  });
  store_partials<T>(memory, rows.count, partials.from(first));
  if (!image) return;
  sums[rows.count] = s_b0_s;
  store_partials<T>(memory + rows.count * kThreads<T>, 1, partials.from(state.fisher_size));
}

/// s.y of the y that pass B would form without damping, from F_j.s; the same in every warp.
__device__ __forceinline__ double curvature_of(const double* products, int gradients,
                                               bool explicit_y) {
  if (explicit_y) return gradients > 0 ? products[0] : 0.0;
  double sum = 0;
  for (int j = threadIdx.x % 32; j < gradients; j += 32) sum += products[j] * products[j];
  return warp_sum(sum) / (gradients > 1 ? gradients : 1);
}

/// weights_j = theta F_j.s / |F|, or theta for a y as given; zero for rows without a gradient.
/// The last weight is that of B0 s: 1 - theta.
template <class T>
__global__ void finish_pass_a_kernel(const __grid_constant__ State state, bool explicit_y,
                                     double damping, Partials partials) {
  const int gradients = int(state.counters[counter::gradients]);
  double* own = state.weights + state.fisher_size;
  sum_partials<T>(partials, gradients, state.weights);
  double theta = 1;
  if (state.image) {
    sum_partials<T>(partials.from(state.fisher_size), 1, own);
    theta = damping_factor(curvature_of(state.weights, gradients, explicit_y), *own, damping);
    __syncthreads();
  }
  for (int64_t j = threadIdx.x; j < state.fisher_size; j += blockDim.x) {
    const double weight = explicit_y ? 1.0 : state.weights[j] / gradients;
    state.weights[j] = j < gradients ? theta * weight : 0.0;
  }
  if (threadIdx.x == 0) *own = 1 - theta;
}

// ------------------------------------------------------------------ pass B

/// Products of pass B before those with the stored pairs: s.y, y.y, s.m.
enum : int { kCurvature, kSquare, kMoment, kOwnProducts };

/// Shared memory of pass B; `factors` are the weights in the type of arithmetic.
template <class T>
struct PassBMemory {
  T *factors, *sums;
  size_t bytes;

  __host__ __device__ PassBMemory(unsigned char* base, int slots, int64_t fisher_size) {
    Carver carver(base);
    factors = carver.take<T>(fisher_size);
    sums = carver.take<T>((kOwnProducts + slots - 1) * kThreads<T>);
    bytes = carver.bytes();
  }
};

/// x as a ring of H keeps it; `stored` is what goes there: zero in place of what is not finite.
template <class H, class T, int W>
__device__ __forceinline__ void round_to_ring(T (&x)[W], T (&stored)[W]) {
#pragma unroll
  for (int j = 0; j < W; ++j) {
    x[j] = convert<T>(convert<H>(x[j]));
    stored[j] = is_finite(x[j]) ? x[j] : T(0);
  }
}

/// y = sum_j weights_j F_j + weights_last B0 s;  s and y to the free slot.  Partial sums, of the
/// vectors as stored: kOwnProducts, then s_i.y per stored pair.  Infinities and NaNs stay in the
/// sums, where they bar the pair.  After a dropped step it writes nothing.
template <class T, class F, class H>
ADAQN_PASS_KERNEL pass_b_kernel(const __grid_constant__ State state, bool aligned,
                                Partials partials) {
  if (!accepts_step(state)) return;
  PassBMemory<T> memory(shared_memory(), state.slots, state.fisher_size);
  const PairRing ring(state.counters, state.slots);
  const T share = share_of_one<T>(state.counters[counter::iterates]);
  const int gradients = int(state.counters[counter::gradients]);
  const Rows<F> fisher = gradient_rows<F>(state, 0, gradients);
  const Rows<H> pairs = stored_rows<H>(state.s_ring, ring);
  H* free_s = static_cast<H*>(state.s_ring.data) + ring.free_slot() * state.s_ring.stride;
  H* free_y = static_cast<H*>(state.y_ring.data) + ring.free_slot() * state.y_ring.stride;
  for (int j = threadIdx.x; j < gradients; j += kThreads<T>) {
    memory.factors[j] = T(state.weights[j]);
  }
  const T of_image = T(state.weights[state.fisher_size]);
  Sums<T> sums(memory.sums, kOwnProducts + pairs.count);
  __syncthreads();

  visit_flat<T, kNarrower<F, H>>(state.numel, aligned, Order::backward, [&](const auto& at) {
    constexpr int W = kPackWidth<decltype(at)>;
    T s[W], y[W] = {}, stored[W];
    add_combination<Cache::stream>(fisher, memory.factors, at, y);
    if (state.image) {
      T b0_s[W];
      load(static_cast<const T*>(state.image), at, b0_s);
#pragma unroll
      for (int j = 0; j < W; ++j) y[j] += of_image * b0_s[j];
    }
    load_difference(state, share, at, s);
    round_to_ring<H>(s, stored);
    store(free_s, at, stored);
    if (state.momentum) sums[kMoment] += product_with(state.momentum, at, s);
    round_to_ring<H>(y, stored);
    store(free_y, at, stored);
    sums[kCurvature] += product(s, y);
    sums[kSquare] += product(y, y);
    add_products<Cache::keep>(pairs, at, y, sums, kOwnProducts);
  });
  store_partials<T>(memory.sums, kOwnProducts + pairs.count, partials);
}

/// column, from the partial sums of pass B, if that made any.
template <class T>
__global__ void finish_pass_b_kernel(const __grid_constant__ State state, Partials partials) {
  if (!accepts_step(state)) return;
  double* totals = reinterpret_cast<double*>(shared_memory());
  const PairRing ring(state.counters, state.slots);
  sum_partials<T>(partials, kOwnProducts + ring.pairs, totals);
  for (int age = threadIdx.x; age < state.slots; age += blockDim.x) {
    const double free_or_zero = age == ring.pairs ? totals[kCurvature] : 0.0;
    state.column[ring.slot(age)] = age < ring.pairs ? totals[kOwnProducts + age] : free_or_zero;
  }
  if (threadIdx.x == 0) {
    state.column[state.slots] = totals[kSquare];
    state.column[state.slots + 1] = totals[kMoment];
  }
}

// ------------------------------------------------------------------ commit

__device__ __forceinline__ PairUpdate decide(const State& state, const double* monitored_loss,
                                             const PairUpdateRule& rule) {
  return decide_pair_update(state.counters, state.slots, state.column,
                            state.projections + state.slots, state.losses, monitored_loss, rule);
}

/// w = w_o and m = 0 after a reset;  w_o = w_n if the anchor moves;  w_sum = 0, unless nothing
/// happens.
template <class T, int Capacity>
ADAQN_PASS_KERNEL commit_kernel(const __grid_constant__ Segments<Capacity> table,
                                const __grid_constant__ State state, const double* monitored_loss,
                                PairUpdateRule rule) {
  const PairUpdate outcome = decide(state, monitored_loss, rule);
  if (outcome == PairUpdate::none) return;
  const T share = share_of_one<T>(state.counters[counter::iterates]);
  T* iterate_sum = static_cast<T*>(state.iterate_sum);
  T* anchor = static_cast<T*>(state.anchor);
  Cursor<Capacity> cursor(table);
  visit_segments<T, T, kPacksAtATime>(cursor, Order::forward, [&](const auto& at) {
    constexpr int W = kPackWidth<decltype(at)>;
    const T zero[W] = {};
    T x[W];
    if (outcome == PairUpdate::reset) {
      load(anchor, at, x);
      store_param(cursor, at, x);
      if (state.momentum) store(static_cast<T*>(state.momentum), at, zero);
    }
    if (moves_anchor(outcome)) {
      load(iterate_sum, at, x);
#pragma unroll
      for (int j = 0; j < W; ++j) x[j] *= share;
      store(anchor, at, x);
    }
    store(iterate_sum, at, zero);
  });
}

__global__ void finish_commit_kernel(const __grid_constant__ State state,
                                     const double* monitored_loss, PairUpdateRule rule) {
  record_pair_update(decide(state, monitored_loss, rule), state.slots, state.column, monitored_loss,
                     rule, state.gram, state.moments, state.losses, state.counters);
}

// ------------------------------------------------------------------ launchers

template <class T, class F>
cudaError_t pass_a(const State& state, bool explicit_y, double damping, const Queue& queue) {
  Shape shape;
  Partials partials;
  ADAQN_CUDA_TRY((flat_launch<T, kWidth<F>>(state, queue, &shape, &partials)));
  shape.blocks.y = unsigned((state.fisher_size + kRowsOfBlock - 1) / kRowsOfBlock);
  const int64_t rows = std::min<int64_t>(state.fisher_size, kRowsOfBlock) + 1;
  shape.shared_bytes = size_t(rows) * kThreads<T> * sizeof(T);
  ADAQN_CUDA_TRY(
      launch(pass_a_kernel<T, F>, shape, queue.stream, state, is_aligned(state), partials));
  const Shape one{dim3(1), kThreads<T>, 0};
  return launch(finish_pass_a_kernel<T>, one, queue.stream, state, explicit_y, damping, partials);
}

template <class T, class F, class H>
cudaError_t pass_b(const State& state, const Queue& queue) {
  Shape shape;
  Partials partials;
  ADAQN_CUDA_TRY((flat_launch<T, kNarrower<F, H>>(state, queue, &shape, &partials)));
  shape.shared_bytes = PassBMemory<T>(nullptr, state.slots, state.fisher_size).bytes;
  ADAQN_CUDA_TRY(
      launch(pass_b_kernel<T, F, H>, shape, queue.stream, state, is_aligned(state), partials));
  const Shape one{dim3(1), kThreads<T>, (kOwnProducts + state.slots - 1) * sizeof(double)};
  return launch(finish_pass_b_kernel<T>, one, queue.stream, state, partials);
}

}  // namespace

cudaError_t curvature_pass_a(const State& state, bool explicit_y, double damping,
                             const Queue& queue) {
  return with_types(state.type, state.fisher_type, [&](auto types) {
    using T = typename decltype(types)::T;
    using F = typename decltype(types)::H;
    return pass_a<T, F>(state, explicit_y, damping, queue);
  });
}

cudaError_t curvature_pass_b(const State& state, const Queue& queue) {
  return with_types(state.type, state.fisher_type, [&](auto types) {
    using T = typename decltype(types)::T;
    using F = typename decltype(types)::H;
    return with_row_type<T>(state.pair_type,
                            [&](auto row) { return pass_b<T, F, decltype(row)>(state, queue); });
  });
}

cudaError_t curvature_commit(const Parameters& list, const State& state,
                             const double* monitored_loss, double min_curvature,
                             double max_increase, double max_growth, const Queue& queue) {
  const PairUpdateRule rule{min_curvature, max_increase, max_growth};
  ADAQN_CUDA_TRY(
      for_each_simple_launch(list, state, [&](auto vectors, const auto& table, const Shape& shape) {
        using T = decltype(vectors);
        return launch(commit_kernel<T, kCapacity<decltype(table)>>, shape, queue.stream, table,
                      state, monitored_loss, rule);
      }));
  return launch(finish_commit_kernel, Shape{dim3(1), 1, 0}, queue.stream, state, monitored_loss,
                rule);
}

cudaError_t load_curvature(const Kinds& kinds) {
  return with_types(kinds.vectors, kinds.fisher, [&](auto types) {
    using T = typename decltype(types)::T;
    using F = typename decltype(types)::H;
    ADAQN_CUDA_TRY(load(pass_a_kernel<T, F>, finish_pass_a_kernel<T>, finish_pass_b_kernel<T>,
                        finish_commit_kernel, commit_kernel<T, kSmallTable>,
                        commit_kernel<T, kLargeTable>));
    return with_row_type<T>(kinds.pairs,
                            [](auto row) { return load(pass_b_kernel<T, F, decltype(row)>); });
  });
}

}  // namespace adaqn::cuda
