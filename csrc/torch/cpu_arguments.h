// What the operations on the CPU take from their arguments.
#pragma once

#include <vector>

#include "../cpu/gradient.h"
#include "../cpu/rows.h"
#include "arguments.h"

namespace adaqn {

using cpu::Dtype;
using cpu::Matrix;
using cpu::Scattered;

inline void parallel_for(int64_t count, void (*body)(int64_t begin, int64_t end, void* context),
                         void* context) {
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, 1, body, context));
}

// ---------------------------------------------------------------- one argument

inline Dtype dtype_of(const Tensor& tensor, const Name& name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::float32;
    case ScalarType::Double:
      return Dtype::float64;
    case ScalarType::BFloat16:
      return Dtype::bfloat16;
    case ScalarType::Half:
      return Dtype::float16;
    default:
      fail(name, "expected float32, float64, bfloat16 or float16");
  }
}

/// The dtype of vectors in the state.
inline Dtype vector_dtype(const Tensor& tensor, const Name& name) {
  check_vector_dtype(tensor, name);
  return dtype_of(tensor, name);
}

inline ScalarType scalar_type(Dtype dtype) {
  return dtype == Dtype::float64 ? ScalarType::Double : ScalarType::Float;
}

/// A vector of the state with one element per scalar parameter.
inline void* vector_of(const Tensor& tensor, const Name& name, const Place& place, int64_t size,
                       Dtype dtype) {
  check_shape(tensor, name, place, {size});
  check_dtype(tensor, name, scalar_type(dtype));
  return tensor.mutable_data_ptr();
}

/// The same, or null where there is none.
inline void* optional_vector_of(const OptionalTensor& tensor, const Name& name, const Place& place,
                                int64_t size, Dtype dtype) {
  return tensor ? vector_of(*tensor, name, place, size, dtype) : nullptr;
}

/// A ring of the state with one column per scalar parameter.
inline Matrix ring_of(const Tensor& tensor, const Name& name, const Place& place,
                      int64_t least_rows, int64_t columns, Dtype dtype) {
  const int64_t rows = check_rows(tensor, name, least_rows);
  const int64_t stride = check_ring_shape(tensor, name, place, rows, columns);
  check_ring_dtype(tensor, name, scalar_type(dtype));
  return {tensor.mutable_data_ptr(), dtype_of(tensor, name), rows, columns, stride};
}

inline double* doubles_of(const Tensor& tensor, const Name& name, const Place& place,
                          std::initializer_list<int64_t> shape) {
  check_shape(tensor, name, place, shape);
  check_dtype(tensor, name, ScalarType::Double);
  return static_cast<double*>(tensor.mutable_data_ptr());
}

/// `count` numbers of any shape.
inline std::vector<double> numbers_of(const Tensor& tensor, const Name& name, const Place& place,
                                      int64_t count) {
  place.check(tensor, name);
  if (tensor.numel() != count || !tensor.is_contiguous()) {
    fail(name, "expected ", count, " contiguous numbers, got shape ", shape_text(tensor.sizes()));
  }
  Scattered numbers;
  numbers.append(tensor.mutable_data_ptr(), dtype_of(tensor, name), true, {}, count);
  std::vector<double> values(static_cast<size_t>(count));
  numbers.load(0, count, values.data());
  return values;
}

inline double number_or(const OptionalTensor& tensor, const Name& name, const Place& place,
                        double otherwise) {
  return tensor ? numbers_of(*tensor, name, place, 1)[0] : otherwise;
}

inline void check_word(const int64_t* counters, int word, const char* meaning, int64_t least,
                       int64_t most) {
  if (counters[word] < least || counters[word] > most) {
    fail({"counters", word}, meaning, ": expected ", least, "..", most, ", got ", counters[word]);
  }
}

inline int64_t* counters_of(const Tensor& tensor, const Place& place) {
  check_shape(tensor, {"counters"}, place, {counter::count});
  check_dtype(tensor, {"counters"}, ScalarType::Long);
  return static_cast<int64_t*>(tensor.mutable_data_ptr());
}

/// The words of namespace flag, behind one word per slot.
inline const double* flags_of(const Tensor& projections, const Place& place, int64_t slots) {
  return doubles_of(projections, {"projections"}, place, {slots + flag::count}) + slots;
}

/// Without slots there are no pairs.
inline void check_pair_words(const int64_t* counters, int64_t slots) {
  const int64_t last = std::max<int64_t>(slots - 1, 0);
  check_word(counters, counter::pairs, "pairs", 0, last);
  check_word(counters, counter::oldest_pair, "oldest pair", 0, last);
}

/// A Fisher ring without rows counts as one of one.
inline void check_gradient_words(const int64_t* counters, int64_t fisher_size) {
  const int64_t size = std::max<int64_t>(fisher_size, 1);
  check_word(counters, counter::gradients, "gradients", 0, size);
  check_word(counters, counter::next_gradient, "next gradient", 0, size - 1);
}

// ---------------------------------------------------------------- lists of tensors

inline void append(Scattered& vector, const Tensor& tensor, const Name& name, const Place& place) {
  place.check(tensor, name);
  const bool contiguous = tensor.is_contiguous();
  cpu::Layout layout{};
  if (!contiguous) layout = {tensor.sizes().data(), tensor.strides().data(), tensor.dim()};
  vector.append(tensor.mutable_data_ptr(), dtype_of(tensor, name), contiguous, layout,
                tensor.numel());
}

inline Scattered params_of(const Tensors& params, const Place& place) {
  Scattered vector;
  for (size_t i = 0; i < params.size(); ++i) {
    append(vector, params[i], {"params", static_cast<int64_t>(i)}, place);
  }
  return vector;
}

/// The gradients, in their parameters' places.
inline Scattered grads_of(const OptionalTensors& grads, const Tensors& params, const Place& place) {
  if (grads.size() != params.size()) {
    fail({"grads"}, "expected one for each of ", params.size(), " params, got ", grads.size());
  }
  Scattered vector;
  for (size_t i = 0; i < grads.size(); ++i) {
    const Name name{"grads", static_cast<int64_t>(i)};
    const int64_t numel = params[i].numel();
    if (!grads[i]) {
      vector.append(nullptr, Dtype::float32, true, {}, numel);
      continue;
    }
    if (grads[i]->numel() != numel) {
      fail(name, "expected ", numel, " elements, got ", grads[i]->numel());
    }
    append(vector, *grads[i], name, place);
  }
  return vector;
}

inline cpu::Gradient gradient_of(const Tensors& params, const OptionalTensors& grads,
                                 const OptionalTensor& grad_scale, bool maximize,
                                 double max_grad_norm, const Place& place) {
  return {grads_of(grads, params, place), grad_scale.has_value(),
          number_or(grad_scale, {"grad_scale"}, place, 1), maximize, max_grad_norm};
}

/// The state's dtype, from the parameters as layout.state_dtype has it.
inline Dtype state_dtype(const Tensors& params) {
  for (const Tensor& p : params) {
    if (p.scalar_type() == ScalarType::Double) return Dtype::float64;
  }
  return Dtype::float32;
}

}  // namespace adaqn
