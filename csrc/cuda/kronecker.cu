// The Kronecker-factored initial matrix: what takes in the gradient, its products, and the step
// without pairs.
//
// A step is three launches, whatever the number of matrices up to a table of them: flags and |g|^2;
// one block per factor, for what is due of L, R and their bases; one block per tile.  The first
// leaves a copy of the control words, from which the others read, so that the last one can write
// them whenever it likes.  Where a basis has been refreshed, its columns have changed places, and v
// must follow: factors leave their order in the workspace, as a tile has two of them.
#include "averages.cuh"
#include "descent.cuh"
#include "eigenbasis.cuh"
#include "load.cuh"
#include "step.cuh"
#include "tiles.cuh"
#include "workspace.cuh"

namespace adaqn::cuda {
namespace {

// ------------------------------------------------------------------ control words

/// What the gradient as given is divided by, and its sign.
__device__ double scale_of(const Scaling& scaling, double surplus) {
  const float divisor = float(surplus) * (scaling.grad_scale ? *scaling.grad_scale : 1.0f);
  return (scaling.maximize ? -1 : 1) / double(divisor);
}

/// Numbers made of flags, counters and weights, with `pending` steps that are not counted.
template <class T>
__device__ void set_words(const Averages& averages, int pending, double scale,
                          const KroneckerMemory<T>& memory) {
  constexpr double epsilon = sizeof(T) == 8 ? 0x1p-52 : 0x1p-23;
  const StepMemory<T>& step = memory.step;
  if (threadIdx.x == 0) {
    const double floor = kronecker_floor(epsilon, step.counters[counter::accepted] + pending);
    *step.average_factors = AverageFactors<T>(averages, *step.weights, 1);
    memory.words->scale = T(scale * step.weights->clip);
    memory.words->spectrum = {T(step.weights->correction), T(floor), T(averages.eps)};
  }
  __syncthreads();
}

/// For kernels after a pass 1 of their own: flags from its partial sums, and the gradient as if it
/// had been given divided by what makes it an outlier.
template <class T>
__device__ void collect_gradient(const State& state, const Kronecker& kronecker,
                                 const Scaling& scaling, const Averages& averages,
                                 const Workspace& workspace, const KroneckerMemory<T>& memory) {
  const StepMemory<T>& step = memory.step;
  const Snapshot* before = workspace.before;
  copy_words(step.counters, before ? before->counters : state.counters, counter::count);
  __syncthreads();
  collect_projections(state, scaling, averages, step, workspace.partials);
  double surplus = 1;
  if (threadIdx.x == 0) {
    double* flags = step.projections;
    const double square = before ? before->square : *kronecker.square;
    const double correction =
        bias_correction(step.counters, kronecker.square_keep, averages.correct_bias, 0);
    surplus = gradient_surplus(flags, correction * square);
    flags[flag::square] /= surplus * surplus;
    step.weights->clip = clip_factor(flags, scaling.max_grad_norm);
  }
  set_words(averages, 1, scale_of(scaling, surplus), memory);
}

/// For kernels after an operation that was pass 1.
template <class T>
__device__ void load_gradient_words(const State& state, const Scaling& scaling,
                                    const Averages& averages, const KroneckerMemory<T>& memory) {
  load_control(state, memory.step);
  copy_words(memory.step.projections, state.projections + state.slots, flag::count);
  __syncthreads();
  weigh(averages, scaling.max_grad_norm, memory.step);
  set_words(averages, 1, scale_of(scaling, 1), memory);
}

/// The average |g|^2 takes in this one.  One thread calls it, of the whole grid.
__device__ void average_square(const Kronecker& kronecker, const double* flags,
                               double max_grad_norm) {
  double* square = kronecker.square;
  *square = next_mean_square(*square, kronecker.square_keep, flags, max_grad_norm);
}

// ------------------------------------------------------------------ factors

/// The strip of a factor as an operand: rows of the gradient for L, columns for R.
template <class T, bool left>
struct Strip {
  static constexpr bool kAlongDepth = left;
  const void* grad;
  Type type;
  int64_t first, pitch;  // elements: before the strip, and between rows of the gradient
  T scale;

  __device__ __forceinline__ T operator()(int i, int k) const {
    return scale * load_element<T>(grad, type, first + (left ? i * pitch + k : k * pitch + i));
  }
};

/// L = .95 L + .05 G G^T, or R likewise.
template <bool left, class T, int Capacity>
__device__ void take_in_strip(const Matrices<Capacity>& table, const Factor& at, T* factor,
                              const KroneckerMemory<T>& memory) {
  const Strip<T, left> strip{table.grad[at.matrix], table.grad_type[at.matrix], at.first, at.pitch,
                             memory.words->scale};
  const int side = at.side;
  product(memory.panels, side, side, at.depth, strip, strip, [=](int i, int j, T value) {
    T& element = factor[i * side + j];
    element = T(kFactorDecay) * element + T(1 - kFactorDecay) * value;
  });
}

/// Gradients enter the factors that are due; then bases follow that are.
template <class T, int Capacity>
__device__ void update_factors(const Matrices<Capacity>& table, const Kronecker& kronecker,
                               const Workspace& workspace, const KroneckerMemory<T>& memory) {
  const KroneckerSchedule schedule{kronecker.call, kronecker.interval};
  unsigned char* scratch = workspace.of_factors.of_block(memory.carver.position());
  for (int n = blockIdx.x; n < table.factors(); n += gridDim.x) {
    const Factor at = locate_factor(table, table.factor[0] + n);
    if (!table.moves(at.matrix)) continue;
    T* factor = static_cast<T*>(kronecker.factors) + at.offset;
    if (schedule.takes_gradient(at.turn)) {
      if (at.is_left) {
        take_in_strip<true>(table, at, factor, memory);
      } else {
        take_in_strip<false>(table, at, factor, memory);
      }
    }
    const int iterations = schedule.iterations(at.turn);
    if (iterations > 0) {
      Carver carver(scratch);
      refresh_basis(memory.panels, factor, static_cast<T*>(kronecker.bases) + at.offset, at.side,
                    iterations, workspace.orders + at.order, BasisMemory<T>(carver, at.side));
    }
  }
}

// ------------------------------------------------------------------ tiles

/// The order of a basis, where this call has refreshed it.
__device__ const int32_t* order_of(const Side& side, const KroneckerSchedule& schedule,
                                   const int32_t* orders) {
  if (side.offset < 0 || schedule.iterations(side.turn) == 0) return nullptr;
  return orders + side.order;
}

/// x = g.
template <class T, int Capacity>
__device__ void load_tile_gradient(const Matrices<Capacity>& table, const Tile& tile, T scale,
                                   const TileMemory<T>& memory) {
  const Type type = table.grad_type[tile.matrix];
  for_each_of_tile<T>(tile, [&](int e, int64_t at) {
    memory.x[e] = scale * load_element<T>(table.grad[tile.matrix], type, tile.offset + at);
  });
}

/// v takes in r, which is what x becomes.
template <class T, int Capacity>
__device__ void accumulate_tile(const Matrices<Capacity>& table, const Tile& tile,
                                const Kronecker& kronecker, const Workspace& workspace, T* v,
                                const KroneckerMemory<T>& memory, TileMemory<T>& own) {
  const KroneckerSchedule schedule{kronecker.call, kronecker.interval};
  permute(tile, order_of(tile.left, schedule, workspace.orders),
          order_of(tile.right, schedule, workspace.orders), v, own);
  load_tile_gradient(table, tile, memory.words->scale, own);
  rotate<false>(memory.panels, tile, static_cast<const T*>(kronecker.bases), own);
  take_in(tile, *memory.step.average_factors, v, own);
}

/// x = q, and m takes in g.
template <class T, int Capacity>
__device__ void blend_tile(const Matrices<Capacity>& table, const Tile& tile,
                           const KroneckerMemory<T>& memory, T* m, const TileMemory<T>& own) {
  const AverageFactors<T>& factors = *memory.step.average_factors;
  load_tile_gradient(table, tile, memory.words->scale, own);
  for_each_of_tile<T>(tile, [&](int e, int64_t at) {
    const T g = own.x[e];
    own.x[e] = factors.of_old * m[at] + factors.of_gradient * g;
    m[at] = factors.beta * m[at] + factors.rest * g;
  });
}

/// w = (1 - lr weight_decay) w - lr x.
template <class T, int Capacity>
__device__ void descend_tile(const Matrices<Capacity>& table, const Tile& tile,
                             const TableRates& rates, const TileMemory<T>& own) {
  const int group = table.group[tile.matrix];
  const double lr = rates.lr_of(group);
  const T rate = T(lr), shrink = T(1 - lr * rates.weight_decay_of(group));
  void* param = table.param[tile.matrix];
  const Type type = table.param_type[tile.matrix];
  for_each_of_tile<T>(tile, [&](int e, int64_t at) {
    const T w = load_element<T>(param, type, tile.offset + at);
    store_element(param, type, tile.offset + at, shrink * w - rate * own.x[e]);
  });
}

/// Calls visit(tile, buffers) for the tiles of this block.
template <class T, int Capacity, class Visitor>
__device__ __forceinline__ void visit_tiles(const Matrices<Capacity>& table,
                                            const Workspace& workspace,
                                            const KroneckerMemory<T>& memory, Visitor visit) {
  unsigned char* scratch = workspace.of_tiles.of_block(memory.carver.position());
  for (int n = blockIdx.x; n < table.tiles(); n += gridDim.x) {
    const Tile tile = locate_tile(table, n);
    Carver carver(scratch);
    TileMemory<T> own(carver, int64_t(tile.rows) * tile.columns);
    __syncthreads();  // who still reads the tile before
    visit(tile, own);
  }
}

// ------------------------------------------------------------------ kernels

template <class T, int Capacity>
ADAQN_PASS_KERNEL flags_kernel(const __grid_constant__ Segments<Capacity> table,
                               const __grid_constant__ State state, Scaling scaling,
                               Partials partials, Snapshot* before, const double* square) {
  StepMemory<T> memory(shared_memory(), 0);
  load_control(state, memory);
  if (blockIdx.x == 0) {
    copy_words(before->counters, memory.counters, counter::count);
    if (threadIdx.x == 0) before->square = *square;
  }
  flags_pass(table, scaling, memory, partials);
}

template <class T, int Capacity>
ADAQN_PASS_KERNEL factors_kernel(const __grid_constant__ Matrices<Capacity> table,
                                 const __grid_constant__ State state,
                                 const __grid_constant__ Kronecker kronecker, Scaling scaling,
                                 Averages averages, bool collect,
                                 const __grid_constant__ Workspace workspace) {
  const KroneckerMemory<T> memory(shared_memory());
  if (collect) {
    collect_gradient(state, kronecker, scaling, averages, workspace, memory);
  } else {
    load_gradient_words(state, scaling, averages, memory);
  }
  if (memory.step.accepted()) update_factors(table, kronecker, workspace, memory);
}

template <class T, int Capacity>
ADAQN_PASS_KERNEL accumulate_kernel(const __grid_constant__ Matrices<Capacity> table,
                                    const __grid_constant__ State state,
                                    const __grid_constant__ Kronecker kronecker, Scaling scaling,
                                    Averages averages, bool first,
                                    const __grid_constant__ Workspace workspace) {
  const KroneckerMemory<T> memory(shared_memory());
  load_gradient_words(state, scaling, averages, memory);
  if (!memory.step.accepted()) return;
  if (first && blockIdx.x == 0 && threadIdx.x == 0) {
    average_square(kronecker, memory.step.flags(), scaling.max_grad_norm);
  }
  visit_tiles(table, workspace, memory, [&](const Tile& tile, TileMemory<T>& own) {
    if (!table.moves(tile.matrix)) return;
    T* v = static_cast<T*>(state.accumulator) + tile.flat;
    accumulate_tile(table, tile, kronecker, workspace, v, memory, own);
  });
}

template <class T, int Capacity>
ADAQN_PASS_KERNEL apply_kernel(const __grid_constant__ Matrices<Capacity> table,
                               const __grid_constant__ State state,
                               const __grid_constant__ Kronecker kronecker, Averages averages,
                               int pending, bool inverse,
                               const __grid_constant__ Workspace workspace) {
  const KroneckerMemory<T> memory(shared_memory());
  load_control(state, memory.step);
  if (threadIdx.x == 0) {
    memory.step.weights->correction =
        bias_correction(memory.step.counters, averages.keep, averages.correct_bias, pending);
  }
  set_words(averages, pending, 1, memory);
  const T* bases = static_cast<const T*>(kronecker.bases);
  visit_tiles(table, workspace, memory, [&](const Tile& tile, TileMemory<T>& own) {
    T* x = static_cast<T*>(state.direction) + tile.flat;
    const T* v = static_cast<const T*>(state.accumulator) + tile.flat;
    for_each_of_tile<T>(tile, [&](int e, int64_t at) { own.x[e] = x[at]; });
    rotate<false>(memory.panels, tile, bases, own);
    scale_by_spectrum(tile, memory.words->spectrum, inverse, v, memory.warps, own);
    rotate<true>(memory.panels, tile, bases, own);
    for_each_of_tile<T>(tile, [&](int e, int64_t at) { x[at] = own.x[e]; });
  });
}

/// Where `first`, the first block ends the step.
template <class T, int Capacity>
ADAQN_PASS_KERNEL tiles_kernel(const __grid_constant__ Matrices<Capacity> table,
                               const __grid_constant__ State state,
                               const __grid_constant__ Kronecker kronecker, Scaling scaling,
                               Averages averages, const __grid_constant__ TableRates rates,
                               bool first, const __grid_constant__ Workspace workspace) {
  const KroneckerMemory<T> memory(shared_memory());
  collect_gradient(state, kronecker, scaling, averages, workspace, memory);
  const bool accepted = memory.step.accepted();
  if (first && blockIdx.x == 0) {
    copy_words(state.projections, memory.step.projections, flag::count);
    finish_step(state, memory.step);
    if (accepted && threadIdx.x == 0) {
      average_square(kronecker, memory.step.flags(), scaling.max_grad_norm);
    }
  }
  if (!accepted) return;
  const T* bases = static_cast<const T*>(kronecker.bases);
  visit_tiles(table, workspace, memory, [&](const Tile& tile, TileMemory<T>& own) {
    if (!table.moves(tile.matrix)) return;
    T* v = static_cast<T*>(state.accumulator) + tile.flat;
    accumulate_tile(table, tile, kronecker, workspace, v, memory, own);
    if (state.momentum) {
      blend_tile(table, tile, memory, static_cast<T*>(state.momentum) + tile.flat, own);
      rotate<false>(memory.panels, tile, bases, own);
    }
    scale_by_spectrum(tile, memory.words->spectrum, false, v, memory.warps, own);
    rotate<true>(memory.panels, tile, bases, own);
    descend_tile(table, tile, rates, own);
  });
}

// ------------------------------------------------------------------ launchers

/// Whether a call leaves all factors and bases as they are.
bool nothing_is_due(const Kronecker& kronecker, int64_t factors) {
  const KroneckerSchedule schedule{kronecker.call, kronecker.interval};
  for (int64_t f = 0; f < factors; ++f) {
    if (schedule.takes_gradient(f) || schedule.iterations(f) > 0) return false;
  }
  return true;
}

template <class T>
cudaError_t enqueue_flags(const Parameters& list, const State& state, const Kronecker& kronecker,
                          const Scaling& scaling, const Queue& queue, Workspace* workspace) {
  Partials& partials = workspace->partials;
  auto enqueue = [&](const auto& table, const TableRange&, const Shape& shape) {
    return launch(flags_kernel<T, kCapacity<decltype(table)>>, shape, queue.stream, table, state,
                  scaling, partials, workspace->before,
                  static_cast<const double*>(kronecker.square));
  };
  ADAQN_CUDA_TRY((for_each_step_launch<T, T>(list, state, partials, enqueue)));
  if (partials.columns == 0) workspace->before = nullptr;
  return cudaSuccess;
}

/// `collect`: flags are still partial sums.
template <class T>
cudaError_t enqueue_factors(const Parameters& list, const State& state, const Kronecker& kronecker,
                            const Scaling& scaling, const Averages* by_kind, bool collect,
                            const Plan<T>& plan, const Queue& queue) {
  if (nothing_is_due(kronecker, Sizes(kronecker).factors)) return cudaSuccess;
  return for_each_table(
      list, kronecker, [&](const auto& table, const MatrixRange& range) -> cudaError_t {
        const int64_t factors = range.next_factor - range.factor;
        if (factors == 0) return cudaSuccess;
        return launch(factors_kernel<T, kCapacity<decltype(table)>>,
                      plan.shape(factors, plan.workspace.of_factors), queue.stream, table, state,
                      kronecker, scaling, by_kind[range.kind], collect, plan.workspace);
      });
}

/// Calls enqueue(table, range, shape) for every table, with blocks for its tiles.
template <class T, class Enqueue>
cudaError_t for_each_tile_launch(const Parameters& list, const Kronecker& kronecker,
                                 const Plan<T>& plan, Enqueue enqueue) {
  return for_each_table(list, kronecker, [&](const auto& table, const MatrixRange& range) {
    return enqueue(table, range, plan.shape(table.tile[table.count], plan.workspace.of_tiles));
  });
}

}  // namespace

size_t workspace_bytes(const Parameters& list, const State& state, const Kronecker& kronecker) {
  size_t bytes = 0;
  with_types(state.type, state.type, [&](auto types) {
    Plan<typename decltype(types)::T> plan;
    ADAQN_CUDA_TRY(plan.make(list, kronecker, nullptr));
    bytes = plan.bytes;
    return cudaSuccess;
  });
  return bytes;
}

cudaError_t kronecker_accumulate(const Parameters& list, const State& state,
                                 const Kronecker& kronecker, const Scaling& scaling,
                                 const Averages* by_kind, const Queue& queue) {
  return with_types(state.type, state.type, [&](auto types) {
    using T = typename decltype(types)::T;
    Plan<T> plan;
    ADAQN_CUDA_TRY(plan.make(list, kronecker, queue.workspace));
    ADAQN_CUDA_TRY(enqueue_factors(list, state, kronecker, scaling, by_kind, false, plan, queue));
    return for_each_tile_launch(
        list, kronecker, plan,
        [&](const auto& table, const MatrixRange& range, const Shape& shape) {
          return launch(accumulate_kernel<T, kCapacity<decltype(table)>>, shape, queue.stream,
                        table, state, kronecker, scaling, by_kind[range.kind], range.first == 0,
                        plan.workspace);
        });
  });
}

cudaError_t kronecker_apply(const State& state, const Kronecker& kronecker, const Averages* by_kind,
                            int pending, bool inverse, const Queue& queue) {
  return with_types(state.type, state.type, [&](auto types) {
    using T = typename decltype(types)::T;
    Plan<T> plan;
    ADAQN_CUDA_TRY(plan.make({}, kronecker, queue.workspace));
    return for_each_tile_launch(
        {}, kronecker, plan, [&](const auto& table, const MatrixRange& range, const Shape& shape) {
          return launch(apply_kernel<T, kCapacity<decltype(table)>>, shape, queue.stream, table,
                        state, kronecker, by_kind[range.kind], pending, inverse, plan.workspace);
        });
  });
}

cudaError_t kronecker_step(const Parameters& list, const State& state, const Kronecker& kronecker,
                           const Scaling& scaling, const Averages* by_kind, const Rates& rates,
                           const Queue& queue) {
  return with_types(state.type, state.type, [&](auto types) {
    using T = typename decltype(types)::T;
    Plan<T> plan;
    ADAQN_CUDA_TRY(plan.make(list, kronecker, queue.workspace));
    ADAQN_CUDA_TRY(enqueue_flags<T>(list, state, kronecker, scaling, queue, &plan.workspace));
    ADAQN_CUDA_TRY(enqueue_factors(list, state, kronecker, scaling, by_kind, true, plan, queue));
    return for_each_tile_launch(
        list, kronecker, plan,
        [&](const auto& table, const MatrixRange& range, const Shape& shape) {
          const bool empty = range.next == range.first;
          const TableRates table_rates =
              empty ? TableRates{} : rates_of(rates, range.tensors, list);
          return launch(tiles_kernel<T, kCapacity<decltype(table)>>, shape, queue.stream, table,
                        state, kronecker, scaling, by_kind[range.kind], table_rates,
                        range.first == 0, plan.workspace);
        });
  });
}

cudaError_t load_kronecker(const Kinds& kinds) {
  return with_types(kinds.vectors, kinds.vectors, [&](auto types) {
    using T = typename decltype(types)::T;
    ADAQN_CUDA_TRY((for_capacities<kSmallTable, kLargeTable>(
        [](auto capacity) { return load(flags_kernel<T, decltype(capacity)::value>); })));
    return for_capacities<kSmallMatrices, kLargeMatrices>([](auto capacity) {
      constexpr int C = decltype(capacity)::value;
      return load(factors_kernel<T, C>, accumulate_kernel<T, C>, apply_kernel<T, C>,
                  tiles_kernel<T, C>);
    });
  });
}

}  // namespace adaqn::cuda
