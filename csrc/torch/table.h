// Checks of what steers the Kronecker operations: the table of matrices, and the schedule.
#pragma once

#include <algorithm>
#include <limits>

#include "../common/kronecker.h"
#include "arguments.h"

namespace adaqn {

/// The rows of `table`, which cover a flat vector of `size` elements.
class Table {
 public:
  Table(const Tensor& table, int64_t size) : rows_(check_rows(table, kName, 0)) {
    check_on_cpu(table);
    check_shape(table, kName, Place(table), {rows_, entry::count});
    check_dtype(table, kName, ScalarType::Long);
    words_ = static_cast<const int64_t*>(table.mutable_data_ptr());
    const int64_t* words = words_;
    matrices_.reserve(static_cast<size_t>(rows_));
    for (int64_t row = 0; row < rows_; ++row, words += entry::count) {
      check_matrix(row, words, size);
      matrices_.emplace_back(words);
      check_factors(row, matrices_.back());
    }
    if (end_ != size) fail(kName, "expected matrices of ", size, " elements, got ", end_);
  }

  const std::vector<KroneckerMatrix>& matrices() const { return matrices_; }
  const int64_t* words() const { return words_; }

  /// Elements of all factors, and of their bases; `given`, if that is more, as some may be spare.
  int64_t squares(int64_t given) const { return std::max(squares_, given); }

  /// The averages of every matrix.
  std::vector<GroupAverages> averages_of_each(const AveragesArguments& arguments) const {
    const auto of_params = arguments.of_each();
    std::vector<GroupAverages> each;
    for (int64_t row = 0; row < rows_; ++row) {
      check(row, entry::param, matrix(row).param, 0, static_cast<int64_t>(of_params.size()) - 1);
      each.push_back(of_params[static_cast<size_t>(matrix(row).param)]);
    }
    return each;
  }

  /// Every matrix lies within its parameter.
  void check_params(const Tensors& params) const {
    int64_t row = 0, start = 0;
    for (size_t i = 0; i < params.size(); ++i) {
      const int64_t end = start + params[i].numel();
      for (; row < rows_ && matrix(row).start < end; ++row) {
        check(row, entry::param, matrix(row).param, static_cast<int64_t>(i),
              static_cast<int64_t>(i));
        if (matrix(row).start + matrix(row).numel() > end) {
          fail({"table", row}, "expected a matrix within params[", i, "], which ends at element ",
               end);
        }
      }
      start = end;
    }
  }

 private:
  static constexpr Name kName{"table"};

  const KroneckerMatrix& matrix(int64_t row) const { return matrices_[static_cast<size_t>(row)]; }

  static void check(int64_t row, int word, int64_t value, int64_t least, int64_t most) {
    static constexpr const char* meanings[] = {"start",      "rows",          "columns",
                                               "row pieces", "column pieces", "left",
                                               "right",      "parameter",     "turn"};
    if (value < least || value > most) {
      fail({"table", row}, meanings[word], ": expected ", least, "..", most, ", got ", value);
    }
  }

  static void check_on_cpu(const Tensor& table) {
    int32_t device = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(table.get(), &device));
    if (device != aoti_torch_device_type_cpu()) fail(kName, "expected a tensor on the CPU");
  }

  void check_matrix(int64_t row, const int64_t* words, int64_t size) {
    const int64_t rows = words[entry::rows], columns = words[entry::columns];
    check(row, entry::start, words[entry::start], end_, end_);
    check(row, entry::rows, rows, 1, size - end_);
    check(row, entry::columns, columns, 1, (size - end_) / rows);
    check(row, entry::row_pieces, words[entry::row_pieces], 1, rows);
    check(row, entry::column_pieces, words[entry::column_pieces], 1, columns);
    end_ += rows * columns;
  }

  void check_factors(int64_t row, const KroneckerMatrix& matrix) {
    check(row, entry::turn, matrix.turn, 0, std::numeric_limits<int32_t>::max());
    check_side(row, entry::left, matrix.left, matrix.rows);
    check_side(row, entry::right, matrix.right, matrix.columns);
  }

  /// Squares one behind the other, so that no two overlap.
  void check_side(int64_t row, int word, int64_t offset, const Cut& cut) {
    if (offset == -1) return;
    constexpr int64_t most = int64_t{1} << 60;
    check(row, word, offset, squares_, most);
    constexpr int64_t longest = int64_t{1} << 24;  // of which the square is far from overflowing
    if (cut.largest() > longest) {
      fail({"table", row}, "expected factors of at most ", longest, " rows, got ", cut.largest());
    }
    squares_ = offset + cut.squares(cut.pieces);
  }

  int64_t rows_;
  const int64_t* words_;
  std::vector<KroneckerMatrix> matrices_;
  int64_t end_ = 0;      ///< of the matrices so far, in the flat vector
  int64_t squares_ = 0;  ///< where their factors end
};

inline KroneckerSchedule schedule_of(int64_t call, int64_t interval) {
  if (call < 1) fail({"call"}, "expected at least 1, got ", call);
  if (interval < 1) fail({"interval"}, "expected at least 1, got ", interval);
  return {call, interval};
}

}  // namespace adaqn
