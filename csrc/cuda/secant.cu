// L-BFGS on a deterministic loss: pairs of successive iterates, and their search.
//
// Every kernel reads from `words` what the search has decided, so that the host need not know. Only
// kernels of one block change words, counters and gram, between those that read them.
#include "../common/secant.h"
#include "launch.cuh"
#include "load.cuh"
#include "products.cuh"
#include "sweep.cuh"
#include "triangular.cuh"

namespace adaqn::cuda {
namespace {

/// Threads of the kernels of one block that add up partial sums.
constexpr int kFinishThreads = 512;
/// Rows of the pairs for which another team of a block's warps is worth its sums.
constexpr int kRowsOfTeam = 2 * kTileRows;

__device__ __forceinline__ bool turns_to(const Search& search, int which) {
  return turns(search.words, which);
}

/// The largest of a block's numbers, in every thread of its first warp; NaN if one is.  `memory`
/// has a word per thread.
template <class T>
__device__ double block_largest(T x, double* memory) {
  __syncthreads();
  memory[threadIdx.x] = double(x);
  __syncthreads();
  double most = 0;
  for (int t = int(threadIdx.x) % 32; t < int(blockDim.x); t += 32) most = larger(most, memory[t]);
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    most = larger(most, __shfl_xor_sync(0xffffffffu, most, mask));
  }
  return most;
}

/// The same over row `i` of partial results, by one warp.
__device__ __forceinline__ double largest_of(const Partials& partials, int i) {
  double most = 0;
  for (int64_t k = threadIdx.x % 32; k < partials.columns; k += 32) {
    most = larger(most, partials.from(i).data[k]);
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    most = larger(most, __shfl_xor_sync(0xffffffffu, most, mask));
  }
  return most;
}

/// Row i of `partials` = the block's sums of `values[i]`.
template <class T, int N>
__device__ void store_own(const double (&values)[N], const Partials& partials) {
  double* memory = reinterpret_cast<double*>(shared_memory());
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) memory[i * kThreads<T> + threadIdx.x] = values[i];
  store_partials<T>(memory, N, partials);
}

template <class T, int N>
constexpr size_t kOwnBytes = N * kThreads<T> * sizeof(double);

// ------------------------------------------------------------------ the trial

/// Partial sums of the trial, then max |g|.
enum : int { kSlope, kSum, kNonfinite, kTrialSums };

template <class T, int Capacity>
ADAQN_PASS_KERNEL measure_kernel(const __grid_constant__ Segments<Capacity> table, T sign,
                                 const T* direction, T* trial, Partials partials) {
  Cursor<Capacity> cursor(table);
  double slope = 0, sum = 0;
  unsigned nonfinite = 0;
  T most = 0;
  visit_segments<T, T>(cursor, Order::forward, [&](const auto& at) {
    constexpr int W = kPackWidth<decltype(at)>;
    T g[W], p[W];
    load(direction, at, p);
    load_grad(cursor, at, g);
#pragma unroll
    for (int j = 0; j < W; ++j) {
      g[j] *= sign;
      const T size = g[j] < 0 ? -g[j] : g[j];
      slope += double(g[j]) * double(p[j]);
      sum += double(size);
      nonfinite += !is_finite(g[j]);
      most = larger(most, size);
    }
    store(trial, at, g);
  });
  const double values[kTrialSums] = {slope, sum, double(nonfinite)};
  store_own<T>(values, partials);
  const double largest = block_largest(most, reinterpret_cast<double*>(shared_memory()));
  if (threadIdx.x == 0) {
    const Partials row = partials.from(kTrialSums);
    row.data[row.first + blockIdx.x] = largest;
  }
}

__global__ void finish_measure_kernel(const __grid_constant__ Search search, Number loss,
                                      double sign, Partials partials) {
  visit_totals(partials.data, kTrialSums, partials.columns, [&](int64_t i, double total) {
    const int others = i == kSum ? word::trial_sum : word::trial_nonfinite;
    search.words[i == kSlope ? word::trial_slope : others] = total;
  });
  if (threadIdx.x >= 32) return;
  const double most = largest_of(partials, kTrialSums);
  if (threadIdx.x > 0) return;
  search.words[word::trial_max] = finite_or_infinite(most);
  search.words[word::trial_loss] = sign * load_element<double>(loss.data, loss.type, 0);
}

__global__ void decide_kernel(const __grid_constant__ Search search, const int64_t* counters,
                              SearchRule rule) {
  decide(rule, counters, search.words);
}

/// The trial becomes the iterate, if it was accepted.
template <class T, int Capacity>
__global__ void __launch_bounds__(kThreads<T>)
    keep_kernel(const __grid_constant__ Segments<Capacity> table,
                const __grid_constant__ Search search) {
  if (!turns_to(search, turn::accept)) return;
  Cursor<Capacity> cursor(table);
  visit_segments<T, T>(cursor, Order::forward, [&](const auto& at) {
    T w[kPackWidth<decltype(at)>];
    load_param(cursor, at, w);
    store(static_cast<T*>(search.origin), at, w);
  });
}

/// w = origin + t p, or the origin itself.  `given`: t is `step`, which becomes that of the words.
template <class T, int Capacity>
__global__ void __launch_bounds__(kThreads<T>)
    move_kernel(const __grid_constant__ Segments<Capacity> table,
                const __grid_constant__ Search search, const T* direction, bool given, double step,
                double limit) {
  if (!given) step = search.words[word::step];
  if (given && blockIdx.x == 0 && threadIdx.x == 0) search.words[word::step] = step;
  const bool moves = leaves_origin(step, search.words[word::slope], limit);
  Cursor<Capacity> cursor(table);
  visit_segments<T, T>(cursor, Order::forward, [&](const auto& at) {
    constexpr int W = kPackWidth<decltype(at)>;
    T w[W], p[W];
    load(static_cast<const T*>(search.origin), at, w);
    if (moves) {
      load(direction, at, p);
#pragma unroll
      for (int j = 0; j < W; ++j) w[j] += T(step) * p[j];
    }
    store_param(cursor, at, w);
  });
}

// ------------------------------------------------------------------ the pair

/// Partial sums of the candidate, as stored: s.y, s.s, y.y, elements of s and y that are not
/// finite; of the new gradient: elements that are not zero, g.g.
enum : int { kCurvature, kLength, kSquare, kBad, kNonzero, kGradientSquare, kOwnSums };

/// x as a ring of H keeps it, zero in place of what is not finite, which is counted.
template <class H, class T>
__device__ __forceinline__ T as_stored(T x, unsigned& bad) {
  const T rounded = convert<T>(convert<H>(x));
  if (is_finite(rounded)) return rounded;
  ++bad;
  return T(0);
}

/// s = t p and y = g' - g to the free row;  g = g'.
template <class T, class H>
ADAQN_PASS_KERNEL candidate_kernel(const __grid_constant__ State state,
                                   const __grid_constant__ Search search, bool aligned,
                                   Partials partials) {
  if (!turns_to(search, turn::accept)) return;
  const int free = PairRing(state.counters, state.slots).free_slot();
  H* s_row = static_cast<H*>(state.s_ring.data) + free * state.s_ring.stride;
  H* y_row = static_cast<H*>(state.y_ring.data) + free * state.y_ring.stride;
  const T* trial = static_cast<const T*>(search.trial);
  T* gradient = static_cast<T*>(search.gradient);
  const T step = T(search.words[word::step]);
  double sums[kOwnSums] = {};
  unsigned bad = 0, nonzero = 0;
  auto visit = [&](const auto& at) {
    constexpr int W = kPackWidth<decltype(at)>;
    T s[W], y[W], g[W];
    load(static_cast<const T*>(state.direction), at, s);
    load(trial, at, g);
    load(gradient, at, y);
#pragma unroll
    for (int j = 0; j < W; ++j) {
      s[j] = as_stored<H>(step * s[j], bad);
      y[j] = as_stored<H>(g[j] - y[j], bad);
      sums[kCurvature] += double(s[j]) * double(y[j]);
      sums[kLength] += double(s[j]) * double(s[j]);
      sums[kSquare] += double(y[j]) * double(y[j]);
      sums[kGradientSquare] += double(g[j]) * double(g[j]);
      nonzero += g[j] != 0;
    }
    store(s_row, at, s);
    store(y_row, at, y);
    store(gradient, at, g);
  };
  visit_flat<T, kWidth<H>>(state.numel, aligned, Order::forward, visit);
  sums[kBad] = double(bad);
  sums[kNonzero] = double(nonzero);
  store_own<T>(sums, partials);
}

/// Rows of s: those of the stored pairs, then the candidate's.
template <class H>
__device__ __forceinline__ Rows<H> rows_with_candidate(const Ring& ring, const PairRing& pairs) {
  Rows<H> rows = stored_rows<H>(ring, pairs);
  ++rows.count;
  return rows;
}

/// s_i.y and s_i.g of the stored pairs and the candidate.
template <class T, class H>
ADAQN_PASS_KERNEL pair_products_kernel(const __grid_constant__ State state,
                                       const __grid_constant__ Search search, bool aligned,
                                       double* partials) {
  if (!turns_to(search, turn::accept)) return;
  const PairRing ring(state.counters, state.slots);
  const H* y_row =
      static_cast<const H*>(state.y_ring.data) + ring.free_slot() * state.y_ring.stride;
  const T* gradient = static_cast<const T*>(search.gradient);
  products<2, T>(
      rows_with_candidate<H>(state.s_ring, ring), state.numel, aligned, Order::backward,
      [&](const auto& at, auto& x) {
        load(y_row, at, x[0]);
        load(gradient, at, x[1]);
      },
      partials);
}

/// What the kernels of a pair leave for the last one.
struct PairSums {
  Partials own;      // of the candidate
  double* products;  // partial sums
  int blocks;        // of the launch that made them
  double* totals;    // s_i.y by age, the candidate's own last
};

/// Whether every s_i.y is finite; by all threads of the block.
__device__ bool all_finite(const double* totals, int count, double* memory) {
  double bad = 0;
  for (int i = int(threadIdx.x); i < count; i += int(blockDim.x)) bad += !is_finite(totals[i]);
  bad = warp_sum(bad);
  if (threadIdx.x % 32 == 0) memory[threadIdx.x / 32] = bad;
  __syncthreads();
  bad = 0;
  for (int i = 0; i < int(blockDim.x) / 32; ++i) bad += memory[i];
  return bad == 0;
}

/// u_i = -s_i.g, zero where no pair is, flags, and the candidate's column of gram if it is stored;
/// then everything else.
__global__ void finish_pair_kernel(const __grid_constant__ State state,
                                   const __grid_constant__ Search search, PairRule rule,
                                   PairSums sums) {
  double* flags = state.projections + state.slots;
  if (turns_to(search, turn::refuse)) {
    if (threadIdx.x == 0) flags[flag::nonfinite] += 1;
    return;
  }
  const bool accepted = turns_to(search, turn::accept);
  const PairRing ring(state.counters, state.slots);
  double* own = reinterpret_cast<double*>(shared_memory());
  Candidate candidate{};
  if (accepted) {
    const int rows = ring.pairs + 1;
    visit_totals(sums.products, 2 * int64_t(rows), Division(rows, sums.blocks).slices,
                 [&](int64_t i, double total) {
                   const int age = int(i / 2);
                   if (i % 2 == 1) state.projections[ring.slot(age)] = -finite_or_zero(total);
                   if (i % 2 == 0 && age < ring.pairs) sums.totals[age] = total;
                 });
    visit_totals(sums.own.data, kOwnSums, sums.own.columns, [&](int64_t i, double total) {
      own[i] = total;
      if (i == kCurvature) sums.totals[ring.pairs] = total;
    });
    __syncthreads();
    const bool finite = all_finite(sums.totals, rows, own + kOwnSums) && own[kBad] == 0;
    if (own[kBad] == 0) candidate = {sums.totals[ring.pairs], own[kSquare], own[kLength], finite};
  }
  const bool store = stores_pair(rule, candidate, search.words);
  const int free = ring.free_slot();
  const int first_unused = accepted ? ring.pairs + 1 : 0;
  for (int age = first_unused + int(threadIdx.x); age < ring.slots; age += int(blockDim.x)) {
    state.projections[ring.slot(age)] = 0;
  }
  for (int age = int(threadIdx.x); store && age <= ring.pairs; age += int(blockDim.x)) {
    state.gram[int64_t(ring.slot(age)) * ring.slots + free] = sums.totals[age];
  }
  __syncthreads();  // who still reads counters and words
  if (threadIdx.x > 0) return;
  if (accepted) {
    flags[flag::nonfinite] = search.words[word::trial_nonfinite];
    flags[flag::nonzero] = own[kNonzero];
    flags[flag::square] = own[kGradientSquare];
  } else {
    flags[flag::nonfinite] += 1;
  }
  if (store) state.gram[int64_t(ring.slots) * ring.slots + free] = candidate.y_y;
  record_pair(rule, candidate, store, state.slots, search.scales, state.counters, search.words);
  state.projections[PairRing(state.counters, state.slots).free_slot()] = 0;
}

// ------------------------------------------------------------------ the direction

/// Coefficients, by age.
struct Coefficients {
  double *a, *c;
  double* factor;  // of the vector to which the rows are added
  void* of_rows;   // in the type of vectors
};

__device__ __forceinline__ void store_coefficient(const State& state, const Coefficients& to,
                                                  int age, double value) {
  store_element(to.of_rows, state.type, age, value);
}

/// Coefficients of  r = -g - Y a.
__global__ void __launch_bounds__(kSolveThreads, 1)
    solve_residual_kernel(const __grid_constant__ State state,
                          const __grid_constant__ Search search, Coefficients to) {
  if (turns_to(search, turn::refuse)) return;
  const Triangle triangle{state.gram, PairRing(state.counters, state.slots)};
  const PanelMemory memory(shared_memory());
  solve_newest_first(triangle, state.projections, memory, to.a, [&](int age, double a) {
    if (age < triangle.ring.pairs) store_coefficient(state, to, age, -a);
  });
  if (threadIdx.x == 0) *to.factor = -1;
}

/// Coefficients of  p = sigma gamma r + S c.
__global__ void __launch_bounds__(kSolveThreads, 1)
    solve_direction_kernel(const __grid_constant__ State state,
                           const __grid_constant__ Search search, Coefficients to) {
  if (turns_to(search, turn::refuse)) return;
  const Triangle triangle{state.gram, PairRing(state.counters, state.slots)};
  const PanelMemory memory(shared_memory());
  NewestFirstProduct growth;
  solve_newest_first(triangle, state.projections, memory, to.a, [&](int age, double a) {
    const bool stored = age < triangle.ring.pairs;
    const double newer = growth.before(stored ? search.scales[triangle.ring.slot(age)] : 1.0);
    if (stored) to.c[age] = newer * a;
  });
  if (threadIdx.x == 0) *to.factor = growth.total() * search.words[word::gamma];
  __syncthreads();
  solve_oldest_first(triangle, *to.factor, state.images, memory, to.c);
  for (int age = int(threadIdx.x); age < triangle.ring.pairs; age += kSolveThreads) {
    store_coefficient(state, to, age, to.c[age]);
  }
}

/// Partial sums of a combination: g.x; then max |x|.
enum : int { kProduct, kDirectionSums };

/// x = factor start + sum_i coefficients_i row_i.
struct Combination {
  Ring ring;
  const void* start;
  void* x;
  int split;
};

template <class T, class H>
ADAQN_PASS_KERNEL combine_kernel(const __grid_constant__ State state,
                                 const __grid_constant__ Search search, Combination what,
                                 Coefficients from, bool aligned, Partials partials) {
  if (turns_to(search, turn::refuse)) return;
  const Rows<H> rows = stored_rows<H>(what.ring, PairRing(state.counters, state.slots));
  const T factor = T(*from.factor);
  double product = 0;
  T most = 0;
  auto finish = [&](const auto& at, auto& x) {
    constexpr int W = kPackWidth<decltype(at)>;
    T start[W], g[W];
    load(static_cast<const T*>(what.start), at, start);
    load(static_cast<const T*>(search.gradient), at, g);
#pragma unroll
    for (int j = 0; j < W; ++j) {
      x[j] += factor * start[j];
      product += double(g[j]) * double(x[j]);
      most = larger(most, x[j] < 0 ? -x[j] : x[j]);
    }
    store(static_cast<T*>(what.x), at, x);
  };
  combinations(rows, static_cast<const T*>(from.of_rows), state.numel, aligned, what.split, finish);
  const double values[kDirectionSums] = {product};
  store_own<T>(values, partials);
  const double largest = block_largest(most, reinterpret_cast<double*>(shared_memory()));
  if (threadIdx.x == 0) partials.from(kDirectionSums).data[blockIdx.x] = largest;
}

/// Slope and size of the direction, and the first step along it; by one warp.
__global__ void finish_direction_kernel(const __grid_constant__ State state,
                                        const __grid_constant__ Search search, double lr,
                                        double first, Partials partials) {
  if (turns_to(search, turn::refuse)) return;
  visit_totals(partials.data, kDirectionSums, partials.columns,
               [&](int64_t, double total) { search.words[word::slope] = total; });
  const double most = largest_of(partials, kDirectionSums);
  if (threadIdx.x > 0) return;
  search.words[word::direction_max] = finite_or_infinite(most);
  search.words[word::step] = first_step(lr, first, state.counters, search.words);
}

// ------------------------------------------------------------------ launchers

bool is_aligned(const State& state, const Search& search) {
  for (const void* p : {search.trial, search.gradient, search.origin, search.residual}) {
    if (reinterpret_cast<uintptr_t>(p) % 16 != 0) return false;
  }
  return is_aligned(state);
}

/// A state whose alignment is that of the search, for tables of parameters.
State with_vectors(const State& state, const Search& search) {
  State result = state;
  result.anchor = search.origin;
  result.image = search.trial;
  return result;
}

/// Memory between the launches of a call; for sizes, with a null base.
struct Workspace {
  double* products;  // where enqueue_images begins, too
  double *own, *totals;
  Coefficients coefficients;
  size_t bytes;

  Workspace(double* base, int64_t slots, int64_t blocks) {
    Carver carver(reinterpret_cast<unsigned char*>(base));
    products = carver.take<double>(2 * product_words(slots, blocks));
    own = carver.take<double>(std::max<int>(kOwnSums, kTrialSums + 1) * blocks);
    totals = carver.take<double>(slots);
    coefficients.a = carver.take<double>(slots);
    coefficients.c = carver.take<double>(slots);
    coefficients.factor = carver.take<double>(1);
    coefficients.of_rows = carver.take<double>(slots);
    bytes = carver.bytes();
  }
};

cudaError_t workspace_of(const State& state, const Queue& queue, int* limit, Workspace* workspace) {
  ADAQN_CUDA_TRY(max_blocks(limit));
  *workspace = Workspace(queue.workspace, state.slots, *limit);
  return cudaSuccess;
}

/// As many teams as leave no block without elements, and no team without rows.
template <class T, class H>
Shape combination_shape(const State& state, int limit, int* split) {
  constexpr int W = kWidth<H>;
  const int64_t units = std::max<int64_t>((state.numel + W - 1) / W, 1);
  *split = 1;
  while (*split * 2 * 32 <= kThreads<T> && units * *split * 2 <= int64_t(limit) * kThreads<T> &&
         *split * 2 * kRowsOfTeam <= state.slots) {
    *split *= 2;
  }
  const int64_t blocks = (units * *split + kThreads<T> - 1) / kThreads<T>;
  return {dim3(unsigned(std::min<int64_t>(blocks, limit))), kThreads<T>,
          std::max(kCombinationBytes<T, H>, kOwnBytes<T, 1>)};
}

/// Enqueues a combination of the pairs' rows; `partials` are those of its launch.
cudaError_t combine(const State& state, const Search& search, Combination what,
                    const Workspace& workspace, int limit, const Queue& queue, Partials* partials) {
  return with_types(state.type, state.pair_type, [&](auto types) {
    using T = typename decltype(types)::T;
    using H = typename decltype(types)::H;
    const Shape shape = combination_shape<T, H>(state, limit, &what.split);
    *partials = {workspace.own, int64_t(shape.blocks.x), 0};
    return launch(combine_kernel<T, H>, shape, queue.stream, state, search, what,
                  workspace.coefficients, is_aligned(state, search), *partials);
  });
}

Shape solve_shape() { return {dim3(1), kSolveThreads, PanelMemory(nullptr).bytes}; }

}  // namespace

size_t secant_workspace_bytes(const Parameters& list, const State& state) {
  int limit = 0;
  if (max_blocks(&limit) != cudaSuccess) return 0;
  const int64_t blocks = std::max<int64_t>(total_blocks<double, 1>(list, limit), limit);
  return Workspace(nullptr, state.slots, blocks).bytes;
}

cudaError_t secant_measure(const Parameters& list, const State& state, const Search& search,
                           const Number& loss, bool maximize, const Queue& queue) {
  const double sign = maximize ? -1 : 1;
  Partials partials{queue.workspace, 0, 0};
  ADAQN_CUDA_TRY(with_types(state.type, state.type, [&](auto types) {
    using T = typename decltype(types)::T;
    constexpr size_t bytes = kOwnBytes<T, kTrialSums>;
    auto enqueue = [&](const auto& table, const TableRange&, const Shape& shape) {
      return launch(measure_kernel<T, kCapacity<decltype(table)>>, shape, queue.stream, table,
                    T(sign), static_cast<const T*>(state.direction), static_cast<T*>(search.trial),
                    partials);
    };
    return for_each_launch<T, kWidth<T>>(list, with_vectors(state, search), bytes, partials,
                                         enqueue);
  }));
  return launch(finish_measure_kernel, Shape{dim3(1), 128, 0}, queue.stream, search, loss, sign,
                partials);
}

cudaError_t secant_decide(const State& state, const Search& search, const SearchRule& rule,
                          const Queue& queue) {
  return launch(decide_kernel, Shape{dim3(1), 1, 0}, queue.stream, search,
                static_cast<const int64_t*>(state.counters), rule);
}

cudaError_t secant_keep(const Parameters& list, const State& state, const Search& search,
                        const Queue& queue) {
  return for_each_simple_launch(list, state,
                                [&](auto vectors, const auto& table, const Shape& shape) {
                                  using T = decltype(vectors);
                                  return launch(keep_kernel<T, kCapacity<decltype(table)>>, shape,
                                                queue.stream, table, search);
                                });
}

cudaError_t secant_pair(const State& state, const Search& search, const PairRule& rule,
                        const Queue& queue) {
  int limit = 0;
  Workspace workspace(nullptr, 0, 0);
  ADAQN_CUDA_TRY(workspace_of(state, queue, &limit, &workspace));
  const bool aligned = is_aligned(state, search);
  PairSums sums{{workspace.own, 0, 0}, workspace.products, 0, workspace.totals};
  ADAQN_CUDA_TRY(with_types(state.type, state.pair_type, [&](auto types) {
    using T = typename decltype(types)::T;
    using H = typename decltype(types)::H;
    sums.own.columns = blocks_for<kWidth<H>, kThreads<T>>(0, state.numel, limit);
    const Shape own{dim3(unsigned(sums.own.columns)), kThreads<T>, kOwnBytes<T, kOwnSums>};
    ADAQN_CUDA_TRY(
        launch(candidate_kernel<T, H>, own, queue.stream, state, search, aligned, sums.own));
    sums.blocks = product_blocks<T, H>(state, limit);
    const Shape shape{dim3(unsigned(sums.blocks)), kThreads<T>, kProductBytes<T, 2>};
    return launch(pair_products_kernel<T, H>, shape, queue.stream, state, search, aligned,
                  sums.products);
  }));
  const size_t bytes = (kOwnSums + kFinishThreads / 32) * sizeof(double);
  return launch(finish_pair_kernel, Shape{dim3(1), kFinishThreads, bytes}, queue.stream, state,
                search, rule, sums);
}

cudaError_t secant_residual(const State& state, const Search& search, bool identity,
                            const Queue& queue) {
  int limit = 0;
  Workspace workspace(nullptr, 0, 0);
  ADAQN_CUDA_TRY(workspace_of(state, queue, &limit, &workspace));
  ADAQN_CUDA_TRY(launch(solve_residual_kernel, solve_shape(), queue.stream, state, search,
                        workspace.coefficients));
  Partials unused;
  const Combination what{state.y_ring, search.gradient, search.residual, 1};
  ADAQN_CUDA_TRY(combine(state, search, what, workspace, limit, queue, &unused));
  if (identity) return cudaSuccess;
  const Gate gate{search.words, nullptr, nullptr};
  return enqueue_images(state, search.residual, is_aligned(state, search), gate, queue);
}

cudaError_t secant_combine(const State& state, const Search& search, double lr, double first,
                           const Queue& queue) {
  int limit = 0;
  Workspace workspace(nullptr, 0, 0);
  ADAQN_CUDA_TRY(workspace_of(state, queue, &limit, &workspace));
  ADAQN_CUDA_TRY(launch(solve_direction_kernel, solve_shape(), queue.stream, state, search,
                        workspace.coefficients));
  Partials partials;
  const Combination what{state.s_ring, search.residual, state.direction, 1};
  ADAQN_CUDA_TRY(combine(state, search, what, workspace, limit, queue, &partials));
  return launch(finish_direction_kernel, Shape{dim3(1), 32, 0}, queue.stream, state, search, lr,
                first, partials);
}

cudaError_t secant_move(const Parameters& list, const State& state, const Search& search,
                        const double* step, double limit, const Queue& queue) {
  return for_each_simple_launch(
      list, with_vectors(state, search), [&](auto vectors, const auto& table, const Shape& shape) {
        using T = decltype(vectors);
        return launch(move_kernel<T, kCapacity<decltype(table)>>, shape, queue.stream, table,
                      search, static_cast<const T*>(state.direction), step != nullptr,
                      step ? *step : 0.0, limit);
      });
}

cudaError_t load_secant(const Kinds& kinds) {
  return with_types(kinds.vectors, kinds.pairs, [&](auto types) {
    using T = typename decltype(types)::T;
    using H = typename decltype(types)::H;
    ADAQN_CUDA_TRY(load(candidate_kernel<T, H>, pair_products_kernel<T, H>, combine_kernel<T, H>,
                        finish_measure_kernel, decide_kernel, finish_pair_kernel,
                        solve_residual_kernel, solve_direction_kernel, finish_direction_kernel));
    return for_capacities<kSmallTable, kLargeTable>([](auto capacity) {
      constexpr int C = decltype(capacity)::value;
      return load(measure_kernel<T, C>, keep_kernel<T, C>, move_kernel<T, C>);
    });
  });
}

}  // namespace adaqn::cuda
