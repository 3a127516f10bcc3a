// Passes over rings of any number of rows, of which a thread never holds more than a tile.
//
// A grid goes through the elements in lockstep: its parts take chunks by turns, so that what one
// pass has read last is what a pass in the other order finds in the cache.
#pragma once

#include "reduce.cuh"
#include "shared.cuh"

namespace adaqn::cuda {

/// Rows of a tile: what a thread has in flight at a time, and sums that it keeps in registers.
constexpr int kTileRows = 6;

// ------------------------------------------------------------------ units

/// What a thread takes at a time: a pack of W elements, or fewer, one by one.
template <int W_>
struct Unit {
  static constexpr int W = W_;
  int64_t begin;
  int count;
};

/// Calls visit(pack) for what makes up the unit: one pack of W elements, or packs of one.
template <int W, class Visitor>
__device__ __forceinline__ void visit_packs(const Unit<W>& at, Visitor visit) {
  if (at.count == W) {
    visit(Pack<W>{at.begin});
  } else {
#pragma unroll 1
    for (int j = 0; j < at.count; ++j) visit(Pack<1>{at.begin + j});
  }
}

/// The same with the pack's elements of x, which visit(pack, elements) may change.
template <class T, int W, class Visitor>
__device__ __forceinline__ void visit_packs(const Unit<W>& at, T (&x)[W], Visitor visit) {
  if (at.count == W) {
    visit(Pack<W>{at.begin}, x);
  } else {
#pragma unroll 1
    for (int j = 0; j < at.count; ++j) {
      T one[1] = {};  // no register has a run-time index
#pragma unroll
      for (int k = 0; k < W; ++k) {
        if (k == j) one[0] = x[k];
      }
      visit(Pack<1>{at.begin + j}, one);
#pragma unroll
      for (int k = 0; k < W; ++k) {
        if (k == j) x[k] = one[0];
      }
    }
  }
}

/// Threads that share the elements of a part.
struct Team {
  int thread, threads;
};

/// Calls visit(unit) for every unit of part `part` of `parts` of [0, numel).  All threads call it
/// equally often; units of no elements are theirs who have nothing left.
template <int W, class Visitor>
__device__ __forceinline__ void visit_units(int64_t numel, bool aligned, Order order, int part,
                                            int parts, const Team& team, Visitor visit) {
  const int width = aligned ? W : 1;
  const int64_t units = (numel + width - 1) / width;
  const int64_t stride = int64_t(parts) * team.threads;
  const int64_t chunks = (units + stride - 1) / stride;
#pragma unroll 1
  for (int64_t k = 0; k < chunks; ++k) {
    const int64_t chunk = order == Order::forward ? k : chunks - 1 - k;
    const int64_t begin = (chunk * stride + int64_t(part) * team.threads + team.thread) * width;
    const int64_t left = begin < numel ? numel - begin : 0;
    visit(Unit<W>{begin, int(left < width ? left : width)});
  }
}

// ------------------------------------------------------------------ rows

/// Rows first..first+count-1 of others.
template <class H>
__device__ __forceinline__ Rows<H> some_rows(const Rows<H>& rows, int first, int count) {
  return {rows.data, rows.stride, rows.slot(first), rows.slots, count};
}

/// Calls visit(k, elements) for the at most kTileRows rows of a tile, after all loads.
template <class H, int W, class Visitor>
__device__ __forceinline__ void visit_tile(const Rows<H>& tile, const Pack<W>& at, Visitor visit) {
  H elements[kTileRows][W];
  RowAddress<H> row(tile, at.begin);
#pragma unroll
  for (int k = 0; k < kTileRows; ++k) {
    if (k < tile.count) load_vector<Cache::keep>(row.get(), elements[k]);
    row.go_to(k + 1);
  }
#pragma unroll
  for (int k = 0; k < kTileRows; ++k) {
    if (k < tile.count) visit(k, elements[k]);
  }
}

// ------------------------------------------------------------------ products

/// How a grid shares the products of rows: a block takes a tile of rows on a slice of the elements,
/// several tiles if there are more of them than blocks.  Blocks on one slice read the same vectors
/// at about the same time.
struct Division {
  int rows, tiles, slices;

  __host__ __device__ Division(int rows_, int blocks)
      : rows(rows_), tiles((rows_ + kTileRows - 1) / kTileRows) {
    slices = tiles > 0 && blocks > tiles ? blocks / tiles : 1;
  }

  /// First row of a tile, or the end of the last one.
  __host__ __device__ int begin(int tile) const { return int(int64_t(rows) * tile / tiles); }
};

/// An upper bound for the partial sums of products with one vector.
inline int64_t product_words(int64_t most_rows, int64_t blocks) {
  const int64_t tiles = (most_rows + kTileRows - 1) / kTileRows;
  return kTileRows * (tiles > blocks ? tiles : blocks);
}

template <class T, int N>
constexpr size_t kProductBytes = kTileRows * N * kThreads<T> * sizeof(T);

/// Products of every row with N vectors, which load(pack, x) brings.  The partial sum of row i and
/// vector n on slice k is partials[(N i + n) slices + k].
template <int N, class T, class H, class Load>
__device__ void products(const Rows<H>& rows, int64_t numel, bool aligned, Order order, Load load,
                         double* partials) {
  T* memory = reinterpret_cast<T*>(shared_memory());
  const Division division(rows.count, int(gridDim.x));
  const Team team{int(threadIdx.x), kThreads<T>};
#pragma unroll 1
  for (int share = int(blockIdx.x); share < division.tiles * division.slices;
       share += int(gridDim.x)) {
    const int tile = share % division.tiles, slice = share / division.tiles;
    const int first = division.begin(tile);
    const Rows<H> own = some_rows(rows, first, division.begin(tile + 1) - first);
    T sums[kTileRows][N] = {};
    auto add = [&](const auto& at) {
      constexpr int W = kPackWidth<decltype(at)>;
      T x[N][W];
      load(at, x);
      visit_tile(own, at, [&](int k, const H(&elements)[W]) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
          for (int j = 0; j < W; ++j) sums[k][n] += convert<T>(elements[j]) * x[n][j];
        }
      });
    };
    visit_units<kWidth<H>>(numel, aligned, order, slice, division.slices, team,
                           [&](const auto& unit) { visit_packs(unit, add); });
    __syncthreads();  // who still reads the sums of the last tile
#pragma unroll
    for (int k = 0; k < kTileRows; ++k) {
#pragma unroll
      for (int n = 0; n < N; ++n) memory[(k * N + n) * kThreads<T> + threadIdx.x] = sums[k][n];
    }
    double* out = partials + int64_t(first) * N * division.slices + slice;
    store_sums<T>(memory, own.count * N, out, division.slices);
  }
}

/// Calls visit(i, total) with the total of every row of `columns` partial sums, by one lane each.
/// All threads of a block call it; where columns are few, a warp takes several rows at a time.
template <class Visitor>
__device__ void visit_totals(const double* partials, int64_t rows, int64_t columns, Visitor visit) {
  int lanes = 1;  // of a row
  while (lanes < 32 && lanes < columns) lanes *= 2;
  const int own = int(threadIdx.x % 32) % lanes, of_warp = 32 / lanes;
  const int warps = int(blockDim.x) / 32;
  for (int64_t first = int64_t(threadIdx.x / 32) * of_warp; first < rows;
       first += int64_t(warps) * of_warp) {
    const int64_t i = first + int(threadIdx.x % 32) / lanes;
    double sum = 0;
    for (int64_t k = own; i < rows && k < columns; k += lanes) sum += partials[i * columns + k];
    for (int mask = lanes / 2; mask > 0; mask /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
    if (own == 0 && i < rows) visit(i, sum);
  }
}

// ------------------------------------------------------------------ combinations

/// Shared memory for teams of a block to add up what each has made.
template <class T, class H>
constexpr size_t kCombinationBytes = kThreads<T> * kWidth<H> * sizeof(T);

/// Adds the x of the other teams to that of the first one; whether this is the first.
template <class T, int W>
__device__ __forceinline__ bool gather_teams(int split, T* memory, T (&x)[W]) {
  if (split == 1) return true;
  const int threads = kThreads<T> / split;
  __syncthreads();  // who still reads what was there
#pragma unroll
  for (int j = 0; j < W; ++j) memory[j * kThreads<T> + threadIdx.x] = x[j];
  __syncthreads();
  if (int(threadIdx.x) >= threads) return false;
  for (int other = 1; other < split; ++other) {
#pragma unroll
    for (int j = 0; j < W; ++j) {
      x[j] += memory[j * kThreads<T> + other * threads + threadIdx.x];
    }
  }
  return true;
}

/// Calls finish(pack, x) with  x = sum_i coefficients[i] row_i  for packs that make up [0, numel).
/// `split` teams of a block, whole warps, have a share of the rows each: few elements would leave
/// most of the device idle otherwise.
template <class T, class H, class Finish>
__device__ void combinations(const Rows<H>& rows, const T* coefficients, int64_t numel,
                             bool aligned, int split, Finish finish) {
  constexpr int W = kWidth<H>;
  T* memory = reinterpret_cast<T*>(shared_memory());
  const int threads = kThreads<T> / split, part = int(threadIdx.x) / threads;
  const Team team{int(threadIdx.x) % threads, threads};
  const int first = int(int64_t(rows.count) * part / split);
  const int end = int(int64_t(rows.count) * (part + 1) / split);
  const Rows<H> own = some_rows(rows, first, end - first);
  auto make = [&](const Unit<W>& unit) {
    T x[W] = {};
    visit_packs(unit, x, [&](const auto& at, auto& part_of_x) {
      add_combination<Cache::keep>(own, coefficients + first, at, part_of_x);
    });
    if (gather_teams(split, memory, x)) visit_packs(unit, x, finish);
  };
  visit_units<W>(numel, aligned, Order::forward, int(blockIdx.x), int(gridDim.x), team, make);
}

}  // namespace adaqn::cuda
