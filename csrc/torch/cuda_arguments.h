// What the operations on CUDA devices take from their arguments, and where they run.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "../cuda/adaqn_cuda.h"
#include "../cuda/device.h"
#include "arguments.h"

// Weak, because one library serves torch with and without CUDA.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace adaqn {

using cuda::Parameters;
using cuda::Queue;
using cuda::State;
using cuda::Type;

// ---------------------------------------------------------------- where to run

inline void check_cuda(cudaError_t error, const char* doing) {
  if (error != cudaSuccess) fail({doing}, cudaGetErrorString(error));
}

/// Makes the device of a tensor the current one, for torch and for the CUDA runtime linked here.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor) : guard_(tensor.get_device()) {
    check_cuda(cuda::make_current(tensor.get_device()), "device");
    void* stream = nullptr;
    if (!aoti_torch_get_current_cuda_stream) fail({"device"}, "this torch has no CUDA");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  template <class Enqueue>
  void run(const char* operation, const Parameters& list, const State& state, const Tensor& like,
           Enqueue enqueue) const {
    run(operation, workspace_bytes(list, state), like, enqueue);
  }

  /// Calls enqueue(queue) with a workspace from torch's allocator, which orders it by stream.
  template <class Enqueue>
  void run(const char* operation, size_t workspace_bytes, const Tensor& like,
           Enqueue enqueue) const {
    const size_t size = sizeof(double), words = (workspace_bytes + size - 1) / size;
    const Tensor workspace =
        torch::stable::new_empty(like, {static_cast<int64_t>(words)}, ScalarType::Double);
    const Queue queue{stream_, static_cast<double*>(workspace.mutable_data_ptr())};
    check_cuda(enqueue(queue), operation);
  }

  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

// ---------------------------------------------------------------- one argument

inline Type type_of(const Tensor& tensor, const Name& name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Type::f32;
    case ScalarType::Double:
      return Type::f64;
    case ScalarType::BFloat16:
      return Type::bf16;
    case ScalarType::Half:
      return Type::f16;
    default:
      fail(name, "expected float32, float64, bfloat16 or float16");
  }
}

inline ScalarType scalar_type(Type type) {
  return type == Type::f64 ? ScalarType::Double : ScalarType::Float;
}

/// One number of `dtype` in device memory, or null.
inline const void* number_of(const OptionalTensor& tensor, const Name& name, const Place& place,
                             ScalarType dtype) {
  if (!tensor) return nullptr;
  place.check(*tensor, name);
  check_dtype(*tensor, name, dtype);
  if (tensor->numel() != 1) fail(name, "expected one number");
  return tensor->data_ptr();
}

// ---------------------------------------------------------------- the state

/// Collects checked pointers into a State.
class StateBuilder {
 public:
  StateBuilder(const Place& place, Type type, int64_t numel) : place_(place) {
    state_.type = state_.pair_type = state_.fisher_type = type;
    state_.numel = numel;
    state_.fisher_size = 1;
  }

  void* vector(const Tensor& tensor, const Name& name) const {
    return vector(tensor, name, state_.numel);
  }

  void* vector(const Tensor& tensor, const Name& name, int64_t numel) const {
    check_shape(tensor, name, place_, {numel});
    check_dtype(tensor, name, scalar_type(state_.type));
    return tensor.mutable_data_ptr();
  }

  double* doubles(const Tensor& tensor, const Name& name,
                  std::initializer_list<int64_t> shape) const {
    check_shape(tensor, name, place_, shape);
    check_dtype(tensor, name, ScalarType::Double);
    return static_cast<double*>(tensor.mutable_data_ptr());
  }

  /// Rows of contiguous elements, any stride apart.
  cuda::Ring ring(const Tensor& tensor, const Name& name, int64_t rows) const {
    check_rows(tensor, name, 0);
    const int64_t stride = check_ring_shape(tensor, name, place_, rows, state_.numel);
    check_ring_dtype(tensor, name, scalar_type(state_.type));
    return {tensor.mutable_data_ptr(), stride};
  }

  /// For an operation that takes any number of pairs; comes first.
  StateBuilder& any_history() {
    most_ = std::numeric_limits<int32_t>::max();
    return *this;
  }

  /// One more than `history_size`, or none at all.
  StateBuilder& slots(int64_t slots) {
    if (slots < 0 || slots - 1 > most_) {
      fail({"history_size"}, "expected 0..", most_, " on a CUDA device, got ", slots - 1,
           "; pass fused=False for more");
    }
    state_.slots = static_cast<int32_t>(slots);
    return *this;
  }

  StateBuilder& s_ring(const Tensor& tensor) {
    state_.s_ring = pair_ring(tensor, {"s_ring"});
    state_.pair_type = type_of(tensor, {"s_ring"});
    return *this;
  }

  StateBuilder& y_ring(const Tensor& tensor) {
    state_.y_ring = pair_ring(tensor, {"y_ring"});
    const Type type = type_of(tensor, {"y_ring"});
    if (state_.s_ring.data && type != state_.pair_type) fail({"y_ring"}, "expected s_ring's dtype");
    state_.pair_type = type;
    return *this;
  }

  StateBuilder& fisher(const Tensor& tensor, int64_t least_rows = 0) {
    const int64_t rows = check_rows(tensor, {"fisher"}, least_rows);
    state_.fisher = ring(tensor, {"fisher"}, rows);
    if (rows == 0) state_.fisher.data = nullptr;
    state_.fisher_size = std::max<int64_t>(rows, 1);
    state_.fisher_type = type_of(tensor, {"fisher"});
    return *this;
  }

  StateBuilder& counters(const Tensor& tensor) {
    check_shape(tensor, {"counters"}, place_, {counter::count});
    check_dtype(tensor, {"counters"}, ScalarType::Long);
    state_.counters = static_cast<int64_t*>(tensor.mutable_data_ptr());
    return *this;
  }

  StateBuilder& gram(const Tensor& tensor) {
    state_.gram = doubles(tensor, {"gram"}, {state_.slots + 1, state_.slots});
    return *this;
  }

  StateBuilder& projections(const Tensor& tensor) {
    state_.projections = doubles(tensor, {"projections"}, {state_.slots + flag::count});
    return *this;
  }

  StateBuilder& moments(const Tensor& tensor) {
    state_.moments = doubles(tensor, {"moments"}, {state_.slots});
    return *this;
  }

  StateBuilder& images(const Tensor& tensor) {
    state_.images = doubles(tensor, {"images"}, {state_.slots + 1});
    return *this;
  }

  StateBuilder& weights(const Tensor& tensor) {
    state_.weights = doubles(tensor, {"weights"}, {state_.fisher_size + 1});
    return *this;
  }

  StateBuilder& column(const Tensor& tensor) {
    state_.column = doubles(tensor, {"column"}, {state_.slots + 2});
    return *this;
  }

  StateBuilder& direction(const Tensor& tensor, const Name& name) {
    state_.direction = vector(tensor, name);
    return *this;
  }

  StateBuilder& iterate_sum(const OptionalTensor& tensor) {
    if (tensor) state_.iterate_sum = vector(*tensor, {"iterate_sum"});
    return *this;
  }

  StateBuilder& anchor(const Tensor& tensor) {
    state_.anchor = vector(tensor, {"anchor"});
    return *this;
  }

  StateBuilder& accumulator(const OptionalTensor& tensor) {
    if (tensor) state_.accumulator = vector(*tensor, {"accumulator"});
    return *this;
  }

  StateBuilder& momentum(const OptionalTensor& tensor) {
    if (tensor) state_.momentum = vector(*tensor, {"momentum"});
    return *this;
  }

  StateBuilder& image(const OptionalTensor& tensor) {
    if (tensor) state_.image = vector(*tensor, {"image"});
    return *this;
  }

  State& operator*() { return state_; }

 private:
  /// Rows of s or y: none, or one for each pair and a free one.
  cuda::Ring pair_ring(const Tensor& tensor, const Name& name) {
    const int64_t rows = check_rows(tensor, name, 0);
    if (rows == 1 && most_ == cuda::kMaxHistory) {
      fail(name, "expected no rows or at least 2, got 1");
    }
    slots(rows);
    return ring(tensor, name, rows);
  }

  const Place& place_;
  State state_{};
  int64_t most_ = cuda::kMaxHistory;
};

/// A builder for vectors of the type and size of `tensor`.
inline StateBuilder state_like(const Tensor& tensor, const Name& name, const Place& place) {
  check_vector_dtype(tensor, name);
  return StateBuilder(place, type_of(tensor, name), tensor.numel());
}

// ---------------------------------------------------------------- lists of tensors

/// Contiguous copies of tensors that are not, by one launch for all of them.
class Copies {
 public:
  /// Where the elements of `tensor` will be in their order, once they are gathered.
  void* of(const Tensor& tensor, Type type) {
    cuda::Strided strided{tensor.mutable_data_ptr(), nullptr, cuda::bytes_of(type), 0, {}, {}};
    const auto sizes = tensor.sizes(), strides = tensor.strides();
    if (strided.set_shape(sizes.size(), sizes.data(), strides.data())) {
      dense_.push_back(torch::stable::new_empty(tensor, sizes));
      strided.dense = dense_.back().mutable_data_ptr();
      strided_.push_back(strided);
    } else {
      dense_.push_back(torch::stable::contiguous(tensor));
      others_.push_back({tensor, dense_.back()});
    }
    return dense_.back().mutable_data_ptr();
  }

  void gather(cudaStream_t stream) const { copy(true, stream); }

  void scatter(cudaStream_t stream) {
    copy(false, stream);
    for (auto& [tensor, dense] : others_) torch::stable::copy_(tensor, dense);
  }

 private:
  void copy(bool to_dense, cudaStream_t stream) const {
    const auto count = static_cast<int64_t>(strided_.size());
    check_cuda(cuda::copy_strided(strided_.data(), count, to_dense, stream), "strides");
  }

  std::vector<cuda::Strided> strided_;
  std::vector<std::pair<Tensor, Tensor>> others_;  // of more dimensions, and their copies
  Tensors dense_;
};

/// Averages by kind, and the kind of each parameter, or matrix: neighbours that are alike are of
/// one.
class AverageKinds {
 public:
  AverageKinds(const std::vector<GroupAverages>& each, bool correct_bias) {
    for (size_t i = 0; i < each.size(); ++i) {
      const GroupAverages& own = each[i];
      if (i == 0 || !(own == each[i - 1])) {
        by_kind_.push_back({own.beta, own.keep, own.add, own.eps, correct_bias});
      }
      of_each_.push_back(static_cast<int32_t>(by_kind_.size()) - 1);
    }
    if (each.empty()) by_kind_.push_back({});  // an empty table is launched, too
  }

  const cuda::Averages* by_kind() const { return by_kind_.data(); }
  const std::vector<int32_t>& of_each() const { return of_each_; }

 private:
  std::vector<cuda::Averages> by_kind_;
  std::vector<int32_t> of_each_;
};

/// What an operation takes of the parameters.
enum class Use { elements, sizes };

/// Parameters as the kernels take them; those that are not contiguous through copies.
class List {
 public:
  List(const OnDevice& device, const Place& place, const Tensors& params,
       const OptionalTensors* grads, const std::vector<int64_t>* group_sizes, Use use)
      : stream_(device.stream()) {
    if (grads && grads->size() != params.size()) {
      fail({"grads"}, "expected one for each of ", params.size(), " params, got ", grads->size());
    }
    rows_.reserve(params.size());
    for (size_t i = 0; i < params.size(); ++i) {
      const Name name{"params", static_cast<int64_t>(i)};
      place.check(params[i], name);
      const Type type = type_of(params[i], name);
      const bool copied = use == Use::elements && !params[i].is_contiguous();
      void* param = copied ? params_.of(params[i], type) : params[i].mutable_data_ptr();
      rows_.push_back({param, nullptr, params[i].numel(), 0, 0, type, type});
      numel_ += params[i].numel();
      if (grads && (*grads)[i]) set_grad(i, *(*grads)[i], place);
    }
    if (group_sizes) set_groups(*group_sizes);
    params_.gather(stream_);
    grads_.gather(stream_);
  }

  void check_size(int64_t numel) const {
    if (numel_ != numel) {
      fail({"params"}, "expected ", numel, " elements in all, got ", numel_);
    }
  }

  void set_kinds(const AverageKinds& kinds) {
    for (size_t i = 0; i < rows_.size(); ++i) rows_[i].kind = kinds.of_each()[i];
  }

  /// Copies what kernels wrote into parameters that are not contiguous.
  void write_back() { params_.scatter(stream_); }

  Parameters parameters() const { return {rows_.data(), static_cast<int64_t>(rows_.size())}; }
  int64_t numel() const { return numel_; }

  /// The state's type, as layout.state_dtype has it.
  Type state_type() const {
    for (const cuda::Tensor& row : rows_) {
      if (row.param_type == Type::f64) return Type::f64;
    }
    return Type::f32;
  }

 private:
  void set_grad(size_t i, const Tensor& grad, const Place& place) {
    const Name name{"grads", static_cast<int64_t>(i)};
    place.check(grad, name);
    if (grad.numel() != rows_[i].numel) {
      fail(name, "expected ", rows_[i].numel, " elements, got ", grad.numel());
    }
    rows_[i].grad_type = type_of(grad, name);
    rows_[i].grad = grad.is_contiguous() ? grad.data_ptr() : grads_.of(grad, rows_[i].grad_type);
  }

  void set_groups(const std::vector<int64_t>& sizes) {
    size_t row = 0;
    for (size_t group = 0; group < sizes.size(); ++group) {
      for (int64_t i = 0; i < sizes[group] && row < rows_.size(); ++i, ++row) {
        rows_[row].group = static_cast<int32_t>(group);
      }
    }
    int64_t sum = 0;
    for (int64_t size : sizes) sum += size;
    if (sum != static_cast<int64_t>(rows_.size())) {
      fail({"group_sizes"}, "expected sizes that sum to ", rows_.size());
    }
  }

  cudaStream_t stream_;
  std::vector<cuda::Tensor> rows_;
  Copies params_, grads_;
  int64_t numel_ = 0;
};

}  // namespace adaqn
