// The block-diagonal Kronecker-factored initial matrix: what is where, when, and how much.
//
// Symbols and formulas are those of adaqn_cuda/reference/kronecker.py.
#pragma once

#include <cmath>

#include "layout.h"
#include "portable.h"

namespace adaqn {

/// Words of a row of `table` (int64).
namespace entry {
enum : int {
  start,          ///< first element of the matrix in the flat vector
  rows,           ///< A
  columns,        ///< B
  row_pieces,     ///< I
  column_pieces,  ///< J
  left,           ///< offset of the first left factor in `factors` and `bases`; -1 without
  right,          ///< the same for the right ones
  param,          ///< index of the parameter
  turn,           ///< number of its first factor, by which factors take turns
  count,          ///< number of words
};
}  // namespace entry

/// A side cut into even pieces, of which the first ones are longer by one where there is a rest.
struct Cut {
  int64_t length;
  int64_t pieces;

  /// Where piece i begins; the length for i = pieces.
  ADAQN_HOST_DEVICE int64_t begin(int64_t i) const { return i * shorter() + longer_before(i); }

  ADAQN_HOST_DEVICE int64_t size(int64_t i) const {
    return shorter() + (i < length % pieces ? 1 : 0);
  }

  ADAQN_HOST_DEVICE int64_t largest() const { return size(0); }

  /// Elements of the square factors of the pieces before i.
  ADAQN_HOST_DEVICE int64_t squares(int64_t i) const {
    const int64_t b = shorter(), longer = longer_before(i);
    return longer * (b + 1) * (b + 1) + (i - longer) * b * b;
  }

 private:
  ADAQN_HOST_DEVICE int64_t shorter() const { return length / pieces; }

  ADAQN_HOST_DEVICE int64_t longer_before(int64_t i) const {
    return i < length % pieces ? i : length % pieces;
  }
};

/// A row of `table`.
struct KroneckerMatrix {
  int64_t start;
  Cut rows;
  Cut columns;
  int64_t left;
  int64_t right;
  int64_t param;
  int64_t turn;

  ADAQN_HOST_DEVICE explicit KroneckerMatrix(const int64_t* words)
      : start(words[entry::start]),
        rows{words[entry::rows], words[entry::row_pieces]},
        columns{words[entry::columns], words[entry::column_pieces]},
        left(words[entry::left]),
        right(words[entry::right]),
        param(words[entry::param]),
        turn(words[entry::turn]) {}

  ADAQN_HOST_DEVICE bool has_left() const { return left >= 0; }
  ADAQN_HOST_DEVICE bool has_right() const { return right >= 0; }
  ADAQN_HOST_DEVICE bool factored() const { return has_left() || has_right(); }
  ADAQN_HOST_DEVICE int64_t numel() const { return rows.length * columns.length; }
  ADAQN_HOST_DEVICE int64_t tiles() const { return rows.pieces * columns.pieces; }
  ADAQN_HOST_DEVICE int64_t factors() const {
    return (has_left() ? rows.pieces : 0) + (has_right() ? columns.pieces : 0);
  }

  /// First element of tile (i, j) in the flat vector, where its rows are columns.length apart.
  ADAQN_HOST_DEVICE int64_t tile(int64_t i, int64_t j) const {
    return start + rows.begin(i) * columns.length + columns.begin(j);
  }

  /// Offsets of L_i and R_j, and of their bases.
  ADAQN_HOST_DEVICE int64_t left_factor(int64_t i) const { return left + rows.squares(i); }
  ADAQN_HOST_DEVICE int64_t right_factor(int64_t j) const { return right + columns.squares(j); }
};

/// Decay of the factors L and R, per gradient that they take in.
constexpr double kFactorDecay = 0.95;
/// Calls of which every factor takes in the gradient; later it takes in every second one.
constexpr int64_t kFirstCalls = 10;
/// Subspace iterations at the first call; later there is one at a time.
constexpr int kFirstIterations = 10;
/// Multiple of the mean eigenvalue that is added to a factor before its eigenbasis is sought.
constexpr double kFactorDamping = 1e-3;
/// Roots of the floor under v: the part that stays, in units of the rounding error, and that of the
/// first step.
constexpr double kNoiseFloor = 1e3, kFirstFloor = 3e-3;
/// Multiple of the root of the average |g|^2 beyond which a gradient is an outlier.
constexpr double kOutlier = 1e3;
/// The most by which an outlier is divided: float32 holds it.
constexpr double kLargestSurplus = 0x1p126;

/// What happens to a factor at a call, by its number.  Factors take turns, so that calls cost
/// alike.
struct KroneckerSchedule {
  int64_t call;  ///< from 1 on
  int64_t interval;

  ADAQN_HOST_DEVICE bool takes_gradient(int64_t factor) const {
    return call <= kFirstCalls || (call + factor) % 2 == 0;
  }

  /// Subspace iterations of the basis.
  ADAQN_HOST_DEVICE int iterations(int64_t factor) const {
    if (call == 1) return kFirstIterations;
    return (call + factor) % interval == 0 ? 1 : 0;
  }
};

/// The floor under v, as a share of the largest v of a tile, after `accepted` steps; `epsilon` is
/// that of the state's dtype.
ADAQN_HOST_DEVICE inline double kronecker_floor(double epsilon, int64_t accepted) {
  const double t = static_cast<double>(accepted < 1 ? 1 : accepted);
  const double noise = kNoiseFloor * epsilon, first = kFirstFloor / (t * t);
  return noise * noise + first * first;
}

/// What the gradient is divided by so that it is no outlier: max(1, |g| / (kOutlier
/// sqrt(mean_square))); 1 while there is no average.
ADAQN_HOST_DEVICE inline double gradient_surplus(const double* flags, double mean_square) {
  const double norm = sqrt(flags[flag::square]), limit = kOutlier * sqrt(mean_square);
  if (!(limit > 0 && norm > limit && is_finite(norm))) return 1;
  const double surplus = norm / limit;
  return surplus < kLargestSurplus ? surplus : kLargestSurplus;
}

/// The average of |g|^2 once it has taken in the clipped gradient.
ADAQN_HOST_DEVICE inline double next_mean_square(double mean_square, double keep,
                                                 const double* flags, double max_norm) {
  const double norm = sqrt(flags[flag::square]);
  const double clipped = norm < max_norm ? norm : max_norm;
  return keep * mean_square + (1 - keep) * clipped * clipped;
}

}  // namespace adaqn
