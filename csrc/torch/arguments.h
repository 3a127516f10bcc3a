// Checks of what a caller hands to an operation.  All of them come before any kernel; an error
// names the argument.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "../common/layout.h"

namespace adaqn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using OptionalTensor = std::optional<Tensor>;
using OptionalTensors = std::vector<OptionalTensor>;

/// An argument's name, or that of one tensor in a list.
struct Name {
  const char* text;
  int64_t index = -1;
};

inline std::ostream& operator<<(std::ostream& out, const Name& name) {
  out << name.text;
  return name.index < 0 ? out : out << '[' << name.index << ']';
}

template <class... Parts>
[[noreturn]] void fail(const Name& name, const Parts&... parts) {
  std::ostringstream message;
  message << "adaqn: " << name << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

template <class Sizes>
std::string shape_text(const Sizes& sizes) {
  std::ostringstream text;
  text << '(';
  for (auto size = sizes.begin(); size != sizes.end(); ++size) {
    text << (size == sizes.begin() ? "" : ", ") << *size;
  }
  text << ')';
  return text.str();
}

inline const char* dtype_text(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Long:
      return "int64";
    default:
      return "another dtype";
  }
}

/// The device and the layout that every tensor of a call must have.
class Place {
 public:
  explicit Place(const Tensor& tensor)
      : type_(get(aoti_torch_get_device_type, tensor)),
        index_(get(aoti_torch_get_device_index, tensor)) {}

  void check(const Tensor& tensor, const Name& name) const {
    static const int32_t strided = aoti_torch_layout_strided();
    const Place other(tensor);
    if (other.type_ != type_ || other.index_ != index_) {
      fail(name, "expected a tensor on the device of the state");
    }
    if (get(aoti_torch_get_layout, tensor) != strided) fail(name, "expected a dense tensor");
  }

 private:
  static int32_t get(AOTITorchError (*getter)(AtenTensorHandle, int32_t*), const Tensor& tensor) {
    int32_t word = 0;
    TORCH_ERROR_CODE_CHECK(getter(tensor.get(), &word));
    return word;
  }

  int32_t type_;
  int32_t index_;
};

/// A tensor of exactly this shape, with any strides.
inline void check_sizes(const Tensor& tensor, const Name& name, const Place& place,
                        std::initializer_list<int64_t> shape) {
  place.check(tensor, name);
  const auto sizes = tensor.sizes();
  if (!std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end())) {
    fail(name, "expected shape ", shape_text(shape), ", got ", shape_text(sizes));
  }
}

/// A contiguous tensor of exactly this shape.
inline void check_shape(const Tensor& tensor, const Name& name, const Place& place,
                        std::initializer_list<int64_t> shape) {
  check_sizes(tensor, name, place, shape);
  if (!tensor.is_contiguous()) fail(name, "expected a contiguous tensor");
}

inline void check_dtype(const Tensor& tensor, const Name& name, ScalarType dtype) {
  const ScalarType found = tensor.scalar_type();
  if (found != dtype) {
    fail(name, "expected dtype ", dtype_text(dtype), ", got ", dtype_text(found));
  }
}

/// The dtype of vectors in the state.
inline ScalarType check_vector_dtype(const Tensor& tensor, const Name& name) {
  const ScalarType found = tensor.scalar_type();
  if (found != ScalarType::Float && found != ScalarType::Double) {
    fail(name, "expected dtype float32 or float64, got ", dtype_text(found));
  }
  return found;
}

/// The dtype of a ring beside vectors of `dtype`.
inline void check_ring_dtype(const Tensor& tensor, const Name& name, ScalarType dtype) {
  if (tensor.scalar_type() != ScalarType::BFloat16) check_dtype(tensor, name, dtype);
}

/// Rows of a matrix that has at least `least` of them.
inline int64_t check_rows(const Tensor& tensor, const Name& name, int64_t least) {
  if (tensor.dim() != 2 || tensor.size(0) < least) {
    fail(name, "expected a matrix of at least ", least, " rows, got shape ",
         shape_text(tensor.sizes()));
  }
  return tensor.size(0);
}

/// Elements between two rows of a ring of this shape; within a row they are contiguous.
inline int64_t check_ring_shape(const Tensor& tensor, const Name& name, const Place& place,
                                int64_t rows, int64_t columns) {
  check_sizes(tensor, name, place, {rows, columns});
  const int64_t stride = tensor.stride(0);
  if ((columns > 1 && tensor.stride(1) != 1) || (rows > 1 && stride < columns)) {
    fail(name, "expected contiguous rows");
  }
  return stride;
}

// ---------------------------------------------------------------- per group

/// How the gradients of a group are averaged; adaqn_cuda/reference/averages.py says what the
/// numbers are.
struct GroupAverages {
  double beta, keep, add, eps;

  bool operator==(const GroupAverages& other) const {
    return beta == other.beta && keep == other.keep && add == other.add && eps == other.eps;
  }
};

/// Numbers by group, of which an operation may lack some.
struct AveragesArguments {
  const std::vector<int64_t>& group_sizes;
  const std::vector<double>* betas;
  const std::vector<double>* keeps;
  const std::vector<double>* adds;
  const std::vector<double>* epsilons;

  /// Those of every parameter.
  std::vector<GroupAverages> of_each() const {
    std::vector<GroupAverages> each;
    for (size_t group = 0; group < group_sizes.size(); ++group) {
      const int64_t size = group_sizes[group];
      if (size < 0) fail({"group_sizes"}, "expected sizes of at least 0, got ", size);
      each.insert(each.end(), static_cast<size_t>(size),
                  {number(betas, {"betas"}, group), number(keeps, {"keeps"}, group),
                   number(adds, {"adds"}, group), number(epsilons, {"epsilons"}, group)});
    }
    return each;
  }

 private:
  double number(const std::vector<double>* numbers, const Name& name, size_t group) const {
    if (numbers == nullptr) return 0;
    if (numbers->size() != group_sizes.size()) {
      fail(name, "expected ", group_sizes.size(), " numbers, got ", numbers->size());
    }
    return (*numbers)[group];
  }
};

/// The same for `count` parameters.
inline std::vector<GroupAverages> averages_of_each(const AveragesArguments& arguments,
                                                   size_t count) {
  auto each = arguments.of_each();
  if (each.size() != count) fail({"group_sizes"}, "expected sizes that sum to ", count);
  return each;
}

}  // namespace adaqn
