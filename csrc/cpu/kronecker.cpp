#include "kronecker.h"

#include <limits>

#include "../common/acceptance.h"
#include "descent.h"
#include "direction.h"
#include "dispatch.h"
#include "eigenbasis.h"
#include "products.h"
#include "scratch.h"

namespace adaqn::cpu {
namespace {

// ---------------------------------------------------------------- what there is to do

/// A tile of a factored matrix, or a chunk of another one.
struct Tile {
  const KroneckerMatrix* matrix;
  int64_t row;     ///< piece, or chunk
  int64_t column;  ///< piece

  int64_t height() const { return matrix->rows.size(row); }
  int64_t width() const { return matrix->columns.size(column); }

  Rows rows() const {
    return {matrix->tile(row, column), height(), width(), matrix->columns.length};
  }

  int64_t chunk_begin() const { return matrix->start + row * kChunk; }
  int64_t chunk_end() const {
    return matrix->start + std::min(matrix->numel(), (row + 1) * kChunk);
  }
};

/// The tiles of the matrices for which `moves`.  Successive ones share the right basis.
template <class Moves>
std::vector<Tile> tiles_of(const KroneckerMatrices& matrices, const Moves& moves) {
  std::vector<Tile> tiles;
  for (const KroneckerMatrix& matrix : matrices) {
    if (!moves(matrix)) continue;
    const bool factored = matrix.factored();
    const int64_t columns = factored ? matrix.columns.pieces : 1;
    const int64_t rows = factored ? matrix.rows.pieces : chunk_count(matrix.numel());
    for (int64_t j = 0; j < columns; ++j) {
      for (int64_t i = 0; i < rows; ++i) tiles.push_back({&matrix, i, j});
    }
  }
  return tiles;
}

/// A factor that takes in the gradient or whose basis is refreshed.
struct FactorTask {
  const KroneckerMatrix* matrix;
  bool left;
  int64_t piece;
  bool takes_gradient;
  int iterations;
  int32_t* order;  ///< of the refreshed basis: the old places of its columns

  int64_t side() const { return left ? matrix->rows.size(piece) : matrix->columns.size(piece); }

  /// How the other side is cut.
  const Cut& across() const { return left ? matrix->columns : matrix->rows; }

  int64_t offset() const { return left ? matrix->left_factor(piece) : matrix->right_factor(piece); }

  Tile tile(int64_t k) const { return left ? Tile{matrix, piece, k} : Tile{matrix, k, piece}; }
};

/// Factors of the matrices that move: what to do with them, and where their orders are.
class FactorPlan {
 public:
  template <class Moves>
  FactorPlan(const KroneckerMatrices& matrices, const KroneckerSchedule& schedule,
             const Moves& moves)
      : matrices_(matrices), first_(matrices.size()) {
    int64_t number = 0, length = 0;
    for (size_t m = 0; m < matrices.size(); ++m) {
      first_[m] = number;
      const KroneckerMatrix& matrix = matrices[m];
      if (moves(matrix)) {
        if (matrix.has_left()) add_side(schedule, matrix, true, matrix.turn, length);
        const int64_t before = matrix.has_left() ? matrix.rows.pieces : 0;
        if (matrix.has_right()) add_side(schedule, matrix, false, matrix.turn + before, length);
      }
      number += matrix.factors();
    }
    places_.resize(static_cast<size_t>(length));
    orders_.assign(static_cast<size_t>(number), nullptr);
    int32_t* order = places_.data();
    for (FactorTask& task : tasks_) {
      if (task.iterations == 0) continue;
      task.order = order;
      order += task.side();
      orders_[number_of(*task.matrix, task.left, task.piece)] = task.order;
    }
  }

  const std::vector<FactorTask>& tasks() const { return tasks_; }

  /// Null where the columns of the basis are where they were.
  const int32_t* left_order(const Tile& tile) const {
    const KroneckerMatrix& matrix = *tile.matrix;
    return matrix.has_left() ? orders_[number_of(matrix, true, tile.row)] : nullptr;
  }

  const int32_t* right_order(const Tile& tile) const {
    const KroneckerMatrix& matrix = *tile.matrix;
    return matrix.has_right() ? orders_[number_of(matrix, false, tile.column)] : nullptr;
  }

 private:
  void add_side(const KroneckerSchedule& schedule, const KroneckerMatrix& matrix, bool left,
                int64_t turn, int64_t& length) {
    const Cut& cut = left ? matrix.rows : matrix.columns;
    for (int64_t i = 0; i < cut.pieces; ++i, ++turn) {
      const bool takes = schedule.takes_gradient(turn);
      const int iterations = schedule.iterations(turn);
      if (iterations > 0) length += cut.size(i);
      if (takes || iterations > 0) {
        tasks_.push_back({&matrix, left, i, takes, iterations, nullptr});
      }
    }
  }

  size_t number_of(const KroneckerMatrix& matrix, bool left, int64_t piece) const {
    const size_t m = static_cast<size_t>(&matrix - matrices_.data());
    const int64_t before = !left && matrix.has_left() ? matrix.rows.pieces : 0;
    return static_cast<size_t>(first_[m] + before + piece);
  }

  const KroneckerMatrices& matrices_;
  std::vector<int64_t> first_;  ///< number of each matrix' first factor
  std::vector<FactorTask> tasks_;
  std::vector<int32_t> places_;
  std::vector<const int32_t*> orders_;  ///< by number of the factor
};

/// Elements that are worth a worker.
constexpr int64_t kWorkerShare = 4096;

int64_t useful_workers(const KroneckerMatrices& matrices, int64_t workers) {
  int64_t numel = 0;
  for (const KroneckerMatrix& matrix : matrices) numel += matrix.numel();
  return std::clamp<int64_t>(numel / kWorkerShare, 1, std::max<int64_t>(workers, 1));
}

// ---------------------------------------------------------------- scratch memory

template <class T>
inline void copy_rows(const T* from, int64_t from_stride, int64_t height, int64_t width, T* to,
                      int64_t stride) {
  for (int64_t k = 0; k < height; ++k) std::copy_n(from + k * from_stride, width, to + k * stride);
}

/// Zeros behind the rows of a block, where products read.
template <class T>
inline void clear_padding(T* block, int64_t stride, int64_t height, int64_t width) {
  for (int64_t k = 0; k < height; ++k) {
    std::fill(block + k * stride + width, block + (k + 1) * stride, T(0));
  }
}

/// The right basis of a tile and its transpose, which stay for the next tile.
template <class T>
struct RightBasis {
  int64_t stride;
  T *basis, *transposed;

  RightBasis(Scratch& scratch, int64_t side)
      : stride(padded<T>(side)),
        basis(scratch.take<T>(side * stride)),
        transposed(scratch.take<T>(side * stride)) {}

  void load(const T* from, int64_t side) const {
    copy_rows(from, side, side, side, basis, stride);
    clear_padding(basis, stride, side, side);
    transpose(basis, stride, side, side, transposed, stride);
    clear_padding(transposed, stride, side, side);
  }
};

template <class T>
struct TileBuffers {
  int64_t stride;
  T *first, *second, *spare;

  TileBuffers(Scratch& scratch, int64_t height, int64_t width)
      : stride(padded<T>(width)),
        first(scratch.take<T>(height * stride)),
        second(scratch.take<T>(height * stride)),
        spare(scratch.take<T>(height * stride)) {}
};

template <class T>
struct FactorBuffers {
  int64_t tile_stride, stride;
  T *tile, *rows, *sum;

  /// `depth`: the longest piece of the other side.
  FactorBuffers(Scratch& scratch, int64_t side, int64_t depth)
      : tile_stride(padded<T>(depth)),
        stride(padded<T>(side)),
        tile(scratch.take<T>(side * tile_stride)),
        rows(scratch.take<T>(depth * stride)),
        sum(scratch.take<T>(side * stride)) {}
};

template <class T>
int64_t scratch_bytes(const std::vector<Tile>& tiles) {
  int64_t most = 0;
  for (const Tile& tile : tiles) {
    if (!tile.matrix->factored()) continue;
    Scratch scratch;
    RightBasis<T>(scratch, tile.width());
    TileBuffers<T>(scratch, tile.height(), tile.width());
    most = std::max(most, scratch.bytes());
  }
  return most;
}

template <class T>
int64_t scratch_bytes(const std::vector<FactorTask>& tasks) {
  int64_t most = 0;
  for (const FactorTask& task : tasks) {
    Scratch scratch;
    FactorBuffers<T>(scratch, task.side(), task.across().largest());
    const int64_t refresh = task.iterations > 0 ? basis_scratch_bytes(task.side()) : 0;
    most = std::max({most, scratch.bytes(), refresh});
  }
  return most;
}

// ---------------------------------------------------------------- factors and bases

/// L = .95 L + .05 G G^T, tile by tile of the strip; R likewise with the transpose.
template <class T>
inline void take_in(const Gradient& gradient, T clip, const FactorTask& task, Scratch scratch,
                    T* factor) {
  const int64_t side = task.side();
  const FactorBuffers<T> b(scratch, side, task.across().largest());
  for (int64_t k = 0; k < task.across().pieces; ++k) {
    const Rows rows = task.tile(k).rows();
    const int64_t depth = task.left ? rows.length : rows.count;
    T* const tile = task.left ? b.tile : b.rows;
    load_gradient(gradient, clip, rows, tile, task.left ? b.tile_stride : b.stride);
    if (task.left) transpose(tile, b.tile_stride, side, depth, b.rows, b.stride);
    clear_padding(b.rows, b.stride, depth, side);
    multiply<T>({side, side, depth, b.rows, b.stride, true, b.rows, b.stride, b.sum, b.stride, true,
                 k == 0 ? T(0) : T(1)});
  }
  const T keep = static_cast<T>(kFactorDecay), add = static_cast<T>(1 - kFactorDecay);
  for (int64_t k = 0; k < side; ++k) {
    T* row = factor + k * side;
    const T* sum = b.sum + k * b.stride;
    for (int64_t l = k; l < side; ++l) row[l] = keep * row[l] + add * sum[l];
  }
  mirror_upper(factor, side, side);
}

template <class T>
inline void update_factors(ParallelFor parallel_for, const KroneckerAccumulate& a, T clip,
                           const FactorPlan& plan, const Workspace& workspace, int64_t workers) {
  const auto& tasks = plan.tasks();
  const auto body = [&](int64_t worker, int64_t index) {
    const FactorTask& task = tasks[static_cast<size_t>(index)];
    T* factor = static_cast<T*>(a.factors) + task.offset();
    T* basis = static_cast<T*>(a.bases) + task.offset();
    if (task.takes_gradient) {
      take_in(a.gradient, clip, task, workspace.of(worker), factor);
    }
    if (task.iterations > 0) {
      refresh_basis(workspace.of(worker), task.side(), task.iterations, factor, basis, task.order);
    }
  };
  for_tasks(parallel_for, workers, static_cast<int64_t>(tasks.size()), body);
}

// ---------------------------------------------------------------- tiles

/// A tile with its bases, in the scratch memory of a worker.
template <class T>
class Rotation {
 public:
  /// `loaded` is the right basis that is in the worker's memory from the tile before.
  Rotation(const T* bases, const Tile& tile, Scratch& scratch, const T*& loaded)
      : height_(tile.height()), width_(tile.width()), right_(scratch, width_) {
    const KroneckerMatrix& matrix = *tile.matrix;
    if (matrix.has_left()) left_ = bases + matrix.left_factor(tile.row);
    if (!matrix.has_right()) {
      loaded = nullptr;
      return;
    }
    has_right_ = true;
    const T* basis = bases + matrix.right_factor(tile.column);
    if (basis != loaded) right_.load(basis, width_);
    loaded = basis;
  }

  /// x becomes Q_L^T x Q_R, with `spare` for what is in between; both may change places.
  void rotate(T*& x, T*& spare, int64_t stride) const {
    multiply_left(true, x, spare, stride);
    multiply_right(right_.basis, x, spare, stride);
  }

  /// x becomes Q_L x Q_R^T.
  void rotate_back(T*& x, T*& spare, int64_t stride) const {
    multiply_left(false, x, spare, stride);
    multiply_right(right_.transposed, x, spare, stride);
  }

 private:
  void multiply_left(bool transposed, T*& x, T*& spare, int64_t stride) const {
    if (left_ == nullptr) return;
    multiply<T>({height_, width_, height_, left_, height_, transposed, x, stride, spare, stride});
    std::swap(x, spare);
  }

  void multiply_right(const T* right, T*& x, T*& spare, int64_t stride) const {
    if (!has_right_) return;
    multiply<T>({height_, width_, width_, x, stride, false, right, right_.stride, spare, stride});
    std::swap(x, spare);
  }

  int64_t height_, width_;
  const T* left_ = nullptr;
  bool has_right_ = false;
  RightBasis<T> right_;
};

/// Row k of a tile of v becomes what row rows[k] was, and its columns likewise; null: all stay.
template <class T>
inline void permute(T* v, const Rows& tile, const int32_t* rows, const int32_t* columns, T* copy,
                    int64_t stride) {
  if (rows == nullptr && columns == nullptr) return;
  copy_rows(v, tile.apart, tile.count, tile.length, copy, stride);
  for (int64_t k = 0; k < tile.count; ++k) {
    const T* from = copy + (rows == nullptr ? k : rows[k]) * stride;
    T* to = v + k * tile.apart;
    if (columns == nullptr) {
      std::copy_n(from, tile.length, to);
    } else {
      for (int64_t l = 0; l < tile.length; ++l) to[l] = from[columns[l]];
    }
  }
}

/// v = keep v + add r*r.
template <class T>
inline void average_squares(T keep, T add, const T* r, int64_t n, T* v) {
  for (int64_t l = 0; l < n; ++l) v[l] = keep * v[l] + add * r[l] * r[l];
}

template <class T>
inline void average_squares(T keep, T add, const Rows& tile, const T* r, int64_t stride, T* v) {
  for (int64_t k = 0; k < tile.count; ++k) {
    average_squares(keep, add, r + k * stride, tile.length, v + k * tile.apart);
  }
}

/// The largest of a tile of v.
template <class T>
inline T largest(const T* v, const Rows& tile) {
  T most = 0;
  for (int64_t k = 0; k < tile.count; ++k) {
    const T* row = v + k * tile.apart;
#pragma omp simd reduction(max : most)
    for (int64_t l = 0; l < tile.length; ++l) most = row[l] > most ? row[l] : most;
  }
  return most;
}

/// What is made of v: its root, sqrt(correction (v + floor max v) + eps), of elements up to `end`.
template <class T>
struct Spectrum {
  int64_t end;
  T correction, floor, eps;

  Spectrum(const Averaging& own, bool correct_bias, const int64_t* counters, int pending)
      : end(own.end),
        correction(static_cast<T>(bias_correction(counters, own.keep, correct_bias, pending))),
        floor(static_cast<T>(kronecker_floor(std::numeric_limits<T>::epsilon(),
                                             counters[counter::accepted] + pending))),
        eps(static_cast<T>(own.eps)) {}

  /// x / root, or with `inverse` x times the root.
  void scale(const T* v, T raised, bool inverse, int64_t n, T* x) const {
    if (inverse) {
      for (int64_t l = 0; l < n; ++l) x[l] *= std::sqrt(correction * (v[l] + raised) + eps);
    } else {
      for (int64_t l = 0; l < n; ++l) x[l] /= std::sqrt(correction * (v[l] + raised) + eps);
    }
  }

  void scale(const T* v, const Rows& tile, bool inverse, T* x, int64_t stride) const {
    const T raised = floor * largest(v, tile);
    for (int64_t k = 0; k < tile.count; ++k) {
      scale(v + k * tile.apart, raised, inverse, tile.length, x + k * stride);
    }
  }
};

template <class T>
std::vector<Spectrum<T>> spectra_of(const Averages& a, const int64_t* counters, int pending) {
  std::vector<Spectrum<T>> spectra;
  spectra.reserve(a.runs.size());
  for (const Averaging& own : a.runs) {
    spectra.emplace_back(own, a.correct_bias, counters, pending);
  }
  return spectra;
}

/// The basis that each worker has in its memory.
template <class T>
using Loaded = std::vector<const T*>;

template <class T>
inline void descend_tile(const Descent<T>& descent, const Rows& tile, const T* p, T* w,
                         int64_t stride) {
  descent.params.load_rows(tile, w, stride);
  for (int64_t k = 0; k < tile.count; ++k) {
    descend(descent.rates, 1, tile.begin + k * tile.apart, tile.length, p + k * stride,
            w + k * stride);
  }
  descent.params.store_rows(tile, w, stride);
}

/// The gradient enters a tile of v; with a descent, the tile's parameters go along H0 q.
template <class T>
inline void move_tile(const KroneckerAccumulate& a, T clip, const FactorPlan& plan,
                      const Tile& tile, Scratch scratch, const T*& loaded,
                      const Descent<T>* descent, const std::vector<Spectrum<T>>& spectra) {
  const Rows rows = tile.rows();
  const Averaging& own = run_at(a.averages.runs, rows.begin);
  const Rotation<T> rotation(static_cast<const T*>(a.bases), tile, scratch, loaded);
  TileBuffers<T> b(scratch, rows.count, rows.length);
  T* v = static_cast<T*>(a.averages.accumulator) + rows.begin;
  permute(v, rows, plan.left_order(tile), plan.right_order(tile), b.spare, b.stride);
  load_gradient(a.gradient, clip, rows, b.first, b.stride);
  clear_padding(b.first, b.stride, rows.count, rows.length);
  const bool blended = descent != nullptr && a.averages.momentum != nullptr;
  if (blended) {
    const Momentum<T>& momentum = run_at(descent->blends, rows.begin).momentum;
    T* m = static_cast<T*>(a.averages.momentum) + rows.begin;
    for (int64_t k = 0; k < rows.count; ++k) {
      blend(momentum, b.first + k * b.stride, rows.length, m + k * rows.apart,
            b.second + k * b.stride);
    }
    clear_padding(b.second, b.stride, rows.count, rows.length);
  }
  rotation.rotate(b.first, b.spare, b.stride);
  average_squares(static_cast<T>(own.keep), static_cast<T>(own.add), rows, b.first, b.stride, v);
  if (descent == nullptr) return;
  if (blended) {
    std::swap(b.first, b.second);
    rotation.rotate(b.first, b.spare, b.stride);
  }
  run_at(spectra, rows.begin).scale(v, rows, false, b.first, b.stride);
  rotation.rotate_back(b.first, b.spare, b.stride);
  descend_tile(*descent, rows, b.first, b.spare, b.stride);
}

/// The same where there is no factor.
template <class T>
inline void move_chunk(const KroneckerAccumulate& a, T clip, const Tile& tile,
                       const Descent<T>* descent) {
  const Averaging& own = run_at(a.averages.runs, tile.chunk_begin());
  const T keep = static_cast<T>(own.keep), add = static_cast<T>(own.add);
  for_blocks(tile.chunk_begin(), tile.chunk_end(), [&](int64_t at, int64_t n) {
    if (descent != nullptr) return descent->move_along_diagonal(at, n);
    T g[kBlock];
    load_gradient(a.gradient, clip, at, n, g);
    average_squares(keep, add, g, n, static_cast<T*>(a.averages.accumulator) + at);
  });
}

/// An accepted step's gradient enters; with a descent the parameters move, too.
template <class T>
void accumulate(ParallelFor parallel_for, const KroneckerAccumulate& a, const Descent<T>* descent) {
  const auto moves = [&](const KroneckerMatrix& matrix) {
    return a.gradient.tensors.run(matrix.start, matrix.start + 1).present;
  };
  const T clip = static_cast<T>(clip_factor(a.flags, a.gradient.max_norm));
  const auto spectra = spectra_of<T>(a.averages, a.counters, 1);
  // All memory comes before anything is written.
  const FactorPlan plan(a.matrices, a.schedule, moves);
  const std::vector<Tile> tiles = tiles_of(a.matrices, moves);
  const int64_t workers = useful_workers(a.matrices, a.workers);
  const Workspace workspace(workers,
                            std::max(scratch_bytes<T>(plan.tasks()), scratch_bytes<T>(tiles)));
  Loaded<T> loaded(static_cast<size_t>(workers), nullptr);

  update_factors(parallel_for, a, clip, plan, workspace, workers);
  const auto body = [&](int64_t worker, int64_t index) {
    const Tile& tile = tiles[static_cast<size_t>(index)];
    if (tile.matrix->factored()) {
      move_tile(a, clip, plan, tile, workspace.of(worker), loaded[static_cast<size_t>(worker)],
                descent, spectra);
    } else {
      move_chunk(a, clip, tile, descent);
    }
  };
  for_tasks(parallel_for, workers, static_cast<int64_t>(tiles.size()), body);
  *a.square = next_mean_square(*a.square, a.square_keep, a.flags, a.gradient.max_norm);
}

// ---------------------------------------------------------------- H0 and its inverse

template <class T>
inline void apply_tile(const KroneckerApply& a, const Spectrum<T>& spectrum, const Tile& tile,
                       Scratch scratch, const T*& loaded) {
  const Rows rows = tile.rows();
  const Rotation<T> rotation(static_cast<const T*>(a.bases), tile, scratch, loaded);
  TileBuffers<T> b(scratch, rows.count, rows.length);
  T* x = static_cast<T*>(a.x) + rows.begin;
  const T* v = static_cast<const T*>(a.averages.accumulator) + rows.begin;
  copy_rows(x, rows.apart, rows.count, rows.length, b.first, b.stride);
  clear_padding(b.first, b.stride, rows.count, rows.length);
  rotation.rotate(b.first, b.spare, b.stride);
  spectrum.scale(v, rows, a.inverse, b.first, b.stride);
  rotation.rotate_back(b.first, b.spare, b.stride);
  copy_rows(b.first, b.stride, rows.count, rows.length, x, rows.apart);
}

template <class T>
void apply(ParallelFor parallel_for, const KroneckerApply& a, T) {
  const std::vector<Tile> tiles = tiles_of(a.matrices, [](const KroneckerMatrix&) { return true; });
  const int64_t workers = useful_workers(a.matrices, a.workers);
  const Workspace workspace(workers, scratch_bytes<T>(tiles));
  Loaded<T> loaded(static_cast<size_t>(workers), nullptr);
  const auto spectra = spectra_of<T>(a.averages, a.counters, a.pending);
  const auto body = [&](int64_t worker, int64_t index) {
    const Tile& tile = tiles[static_cast<size_t>(index)];
    const Spectrum<T>& spectrum = run_at(spectra, tile.matrix->start);
    if (tile.matrix->factored()) {
      return apply_tile(a, spectrum, tile, workspace.of(worker),
                        loaded[static_cast<size_t>(worker)]);
    }
    const int64_t at = tile.chunk_begin();
    spectrum.scale(static_cast<const T*>(a.averages.accumulator) + at, T(0), a.inverse,
                   tile.chunk_end() - at, static_cast<T*>(a.x) + at);
  };
  for_tasks(parallel_for, workers, static_cast<int64_t>(tiles.size()), body);
}

// ---------------------------------------------------------------- the step

/// Goes on as if the gradient had been given divided by what makes it an outlier.
void shorten_outlier(const KroneckerStep& a) {
  const double correction = bias_correction(a.counters, a.square_keep, a.averages.correct_bias, 0);
  const double surplus = gradient_surplus(a.flags, correction * *a.square);
  if (surplus == 1) return;
  a.flags[flag::square] /= surplus * surplus;
  const float divisor = static_cast<float>(surplus) * static_cast<float>(a.gradient.scale);
  a.gradient.scale = static_cast<double>(divisor);
  a.gradient.scaled = true;
}

}  // namespace

void kronecker_accumulate(ParallelFor parallel_for, const KroneckerAccumulate& a) {
  if (!step_is_accepted(a.flags, a.counters)) return;
  with_vector_type(a.dtype, [&](auto t) { accumulate<decltype(t)>(parallel_for, a, nullptr); });
}

void kronecker_apply(ParallelFor parallel_for, const KroneckerApply& a) {
  with_vector_type(a.dtype, [&](auto t) { apply(parallel_for, a, t); });
}

void kronecker_step(ParallelFor parallel_for, const KroneckerStep& a) {
  const Matrix no_pairs{nullptr, a.dtype, 0, a.params.size(), 0};
  direction_pass1(parallel_for,
                  {a.gradient, a.dtype, no_pairs, a.counters, a.found_inf, 0, nullptr, a.flags});
  shorten_outlier(a);
  const bool accepted = step_is_accepted(a.flags, a.counters);
  if (accepted) {
    with_vector_type(a.dtype, [&](auto t) {
      const Descent<decltype(t)> descent(a.params, a.gradient, a.averages, a.rates, a.flags,
                                         a.counters);
      accumulate(parallel_for,
                 {a.gradient, a.dtype, a.matrices, a.schedule, a.averages, a.square_keep, a.flags,
                  a.counters, a.factors, a.bases, a.square, a.workers},
                 &descent);
    });
  }
  count_step(a.counters, a.flags, accepted, 1);
}

}  // namespace adaqn::cpu
