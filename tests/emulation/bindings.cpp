// The CUDA operations, run on the CPU by the emulation, for Python: addresses and sizes in, errors
// as exceptions.  tests/emulated.py turns tensors into such calls.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "../../csrc/cuda/adaqn_cuda.h"
#include "../../csrc/cuda/device.h"

namespace py = pybind11;
using namespace adaqn::cuda;

using Values = std::vector<double>;

// recursions.cpp
std::pair<Values, Values> recursions(const Values& gram, const std::vector<int64_t>& counters,
                                     int slots, const Values& u, const Values& z);

namespace {

using Row = std::tuple<uintptr_t, uintptr_t, int64_t, int32_t, int32_t, int, int>;

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

/// Tensors of a call as (param, grad, numel, group, kind, param type, grad type).
struct List {
  std::vector<Tensor> tensors;

  explicit List(const std::vector<Row>& rows) {
    for (const auto& [param, grad, numel, group, kind, param_type, grad_type] : rows) {
      tensors.push_back({pointer<void>(param), pointer<void>(grad), numel, group, kind,
                         Type(param_type), Type(grad_type)});
    }
  }
  operator Parameters() const { return {tensors.data(), int64_t(tensors.size())}; }
};

State state_of(const py::dict& d) {
  auto integer = [&](const char* name) { return d[name].cast<int64_t>(); };
  auto address = [&](const char* name) {
    return d.contains(name) ? d[name].cast<uintptr_t>() : uintptr_t(0);
  };
  auto vector = [&](const char* name) { return pointer<void>(address(name)); };
  auto words = [&](const char* name) { return pointer<double>(address(name)); };
  auto ring = [&](const char* name) {
    const std::string stride = std::string(name) + "_stride";
    return Ring{vector(name), d.contains(stride.c_str()) ? integer(stride.c_str()) : 0};
  };
  State s{};
  s.numel = integer("numel");
  s.fisher_size = integer("fisher_size");
  s.slots = int32_t(integer("slots"));
  s.type = Type(integer("type"));
  s.pair_type = Type(integer("pair_type"));
  s.fisher_type = Type(integer("fisher_type"));
  s.accumulator = vector("accumulator");
  s.momentum = vector("momentum");
  s.iterate_sum = vector("iterate_sum");
  s.anchor = vector("anchor");
  s.direction = vector("direction");
  s.image = vector("image");
  s.s_ring = ring("s_ring");
  s.y_ring = ring("y_ring");
  s.fisher = ring("fisher");
  s.gram = words("gram");
  s.moments = words("moments");
  s.losses = words("losses");
  s.projections = words("projections");
  s.images = words("images");
  s.weights = words("weights");
  s.column = words("column");
  s.counters = pointer<int64_t>(address("counters"));
  return s;
}

Search search_of(const py::dict& d) {
  auto address = [&](const char* name) {
    return d.contains(name) ? d[name].cast<uintptr_t>() : uintptr_t(0);
  };
  auto vector = [&](const char* name) { return pointer<void>(address(name)); };
  return {vector("trial"),
          vector("gradient"),
          vector("origin"),
          vector("residual"),
          pointer<double>(address("scales")),
          pointer<double>(address("words"))};
}

/// A workspace of exactly the size asked for, full of NaN, whose overrun is an error.
class Workspace {
 public:
  explicit Workspace(size_t bytes)
      : words_((bytes + sizeof(double) - 1) / sizeof(double) + kGuard, kNan) {}
  Queue queue() { return {nullptr, words_.data()}; }
  void check(cudaError_t error) const {
    if (error != cudaSuccess) throw std::runtime_error("CUDA error " + std::to_string(error));
    for (size_t i = words_.size() - kGuard; i < words_.size(); ++i) {
      if (words_[i] == words_[i]) throw std::runtime_error("write past the end of the workspace");
    }
  }

 private:
  static constexpr size_t kGuard = 64;
  static constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
  std::vector<double> words_;
};

using Rows = std::vector<Row>;
using ScalingRow = std::tuple<uintptr_t, uintptr_t, bool, double>;
using AveragesRow = std::tuple<double, double, double, double, bool>;
using AveragesRows = std::vector<AveragesRow>;
using KroneckerRow = std::tuple<uintptr_t, int64_t, uintptr_t, uintptr_t, uintptr_t, double,
                                int64_t, int64_t, std::vector<int32_t>>;
using StridedRow =
    std::tuple<uintptr_t, uintptr_t, int, std::vector<int64_t>, std::vector<int64_t>>;
using RatesRow = std::tuple<Values, Values, uintptr_t, uintptr_t>;

Scaling scaling_of(const ScalingRow& row) {
  const auto& [grad_scale, found_inf, maximize, max_grad_norm] = row;
  return {pointer<float>(grad_scale), pointer<float>(found_inf), maximize, max_grad_norm};
}

Averages averages_of(const AveragesRow& row) {
  const auto& [beta, keep, add, eps, correct_bias] = row;
  return {beta, keep, add, eps, correct_bias};
}

std::vector<Averages> averages_of(const AveragesRows& rows) {
  std::vector<Averages> by_kind;
  for (const AveragesRow& row : rows) by_kind.push_back(averages_of(row));
  return by_kind;
}

Rates rates_of(const RatesRow& row) {
  const auto& [lr, decay, lr_tensor, decay_tensor] = row;
  return {lr.data(), decay.data(), pointer<double>(lr_tensor), pointer<double>(decay_tensor)};
}

Kronecker kronecker_of(const KroneckerRow& row) {
  const auto& [table, matrices, factors, bases, square, square_keep, call, interval, kinds] = row;
  return {pointer<int64_t>(table),
          matrices,
          pointer<void>(factors),
          pointer<void>(bases),
          pointer<double>(square),
          square_keep,
          call,
          interval,
          kinds.data()};
}

/// Runs operation(list, state, queue).
template <class Operation>
void run(const std::vector<Row>& rows, const py::dict& d, Operation operation) {
  const List list(rows);
  const State state = state_of(d);
  Workspace workspace(workspace_bytes(list, state));
  workspace.check(operation(list, state, workspace.queue()));
}

/// Runs operation(list, state, kronecker, queue).
template <class Operation>
void run(const std::vector<Row>& rows, const py::dict& d, const KroneckerRow& row,
         Operation operation) {
  const List list(rows);
  const State state = state_of(d);
  const Kronecker kronecker = kronecker_of(row);
  Workspace workspace(workspace_bytes(list, state, kronecker));
  workspace.check(operation(list, state, kronecker, workspace.queue()));
}

/// Runs operation(list, state, search, queue).
template <class Operation>
void run_search(const std::vector<Row>& rows, const py::dict& d, Operation operation) {
  const List list(rows);
  const State state = state_of(d);
  Workspace workspace(secant_workspace_bytes(list, state));
  workspace.check(operation(list, state, search_of(d), workspace.queue()));
}

}  // namespace

PYBIND11_MODULE(adaqn_cuda_emulated, m) {
  m.def("configure", [](int multiprocessors, int blocks, int shared_bytes, bool reverse_order) {
    emulation::multiprocessors = multiprocessors;
    emulation::blocks_per_multiprocessor = blocks;
    emulation::shared_bytes = shared_bytes;
    emulation::reverse_order = reverse_order;
  });
  m.def("omit_barrier", [](const std::string& file, int line) {
    emulation::omitted_file = file;
    emulation::omitted_line = line;
  });
  m.def("launches", [] { return emulation::launches; });
  m.def("limit_cooperative_launches", [](int blocks) { emulation::cooperative_limit = blocks; });
  m.def("make_current", [](int device) { make_current(device); });
  m.def("device_changes", [] { return emulation::device_changes; });
  m.def("grants", [] { return emulation::grants; });
  m.def("unloaded_launches", [] { return emulation::unloaded_launches; });
  m.def("unload", [] { emulation::loaded.clear(); });
  // Tensors as (strided address, dense address, bytes of an element, sizes, strides).
  m.def("copy_strided", [](const std::vector<StridedRow>& rows, bool to_dense) {
    std::vector<Strided> tensors;
    for (const auto& [strided, dense, bytes, sizes, strides] : rows) {
      Strided& t = tensors.emplace_back();
      t = {pointer<void>(strided), pointer<void>(dense), bytes, 0, {}, {}};
      if (!t.set_shape(sizes.size(), sizes.data(), strides.data())) return false;
    }
    const int64_t count = int64_t(tensors.size());
    return copy_strided(tensors.data(), count, to_dense, nullptr) == cudaSuccess;
  });
  m.def("load", [](int vectors, int pairs, int fisher, bool has_pairs, bool kronecker) {
    load_kernels({Type(vectors), Type(pairs), Type(fisher)}, has_pairs, kronecker);
  });
  m.def("load_search", [](int vectors, int pairs, bool kronecker) {
    load_search_kernels({Type(vectors), Type(pairs), Type(pairs)}, kronecker);
  });
  m.def("recursions", recursions);
  m.def("direction_step",
        [](const Rows& rows, const py::dict& state, const ScalingRow& scaling,
           const AveragesRow& averages, double max_direction, const RatesRow& rates) {
          run(rows, state, [&](const Parameters& list, const State& s, const Queue& queue) {
            return direction_step(list, s, scaling_of(scaling), averages_of(averages),
                                  max_direction, rates_of(rates), queue);
          });
        });
  m.def("direction_pass1",
        [](const Rows& rows, const py::dict& state, const ScalingRow& scaling, double beta) {
          run(rows, state, [&](const Parameters& list, const State& s, const Queue& queue) {
            return direction_pass1(list, s, scaling_of(scaling), beta, queue);
          });
        });
  m.def("direction_pass2", [](const Rows& rows, const py::dict& state, const ScalingRow& scaling,
                              const AveragesRows& averages, bool identity) {
    run(rows, state, [&](const Parameters& list, const State& s, const Queue& queue) {
      return direction_pass2(list, s, scaling_of(scaling), averages_of(averages).data(), identity,
                             queue);
    });
  });
  m.def("direction_images", [](const py::dict& state) {
    run({}, state, [](const Parameters&, const State& s, const Queue& queue) {
      return direction_images(s, queue);
    });
  });
  m.def("direction_pass3", [](const Rows& rows, const py::dict& state, double beta,
                              double max_direction, const RatesRow& rates) {
    run(rows, state, [&](const Parameters& list, const State& s, const Queue& queue) {
      return direction_pass3(list, s, beta, max_direction, rates_of(rates), queue);
    });
  });
  m.def("diagonal_step", [](const Rows& rows, const py::dict& state, const ScalingRow& scaling,
                            const AveragesRows& averages, const RatesRow& rates) {
    run(rows, state, [&](const Parameters& list, const State& s, const Queue& queue) {
      return diagonal_step(list, s, scaling_of(scaling), averages_of(averages).data(),
                           rates_of(rates), queue);
    });
  });
  m.def("kronecker_accumulate",
        [](const Rows& rows, const py::dict& state, const KroneckerRow& kronecker,
           const ScalingRow& scaling, const AveragesRows& averages) {
          run(rows, state, kronecker,
              [&](const Parameters& list, const State& s, const Kronecker& k, const Queue& queue) {
                return kronecker_accumulate(list, s, k, scaling_of(scaling),
                                            averages_of(averages).data(), queue);
              });
        });
  m.def("kronecker_apply", [](const py::dict& state, const KroneckerRow& kronecker,
                              const AveragesRows& averages, int pending, bool inverse) {
    run({}, state, kronecker,
        [&](const Parameters&, const State& s, const Kronecker& k, const Queue& queue) {
          return kronecker_apply(s, k, averages_of(averages).data(), pending, inverse, queue);
        });
  });
  m.def("kronecker_step",
        [](const Rows& rows, const py::dict& state, const KroneckerRow& kronecker,
           const ScalingRow& scaling, const AveragesRows& averages, const RatesRow& rates) {
          run(rows, state, kronecker,
              [&](const Parameters& list, const State& s, const Kronecker& k, const Queue& queue) {
                return kronecker_step(list, s, k, scaling_of(scaling), averages_of(averages).data(),
                                      rates_of(rates), queue);
              });
        });
  m.def("iterate_swap",
        [](const Rows& rows, const py::dict& state) { run(rows, state, iterate_swap); });
  m.def("iterate_restore",
        [](const Rows& rows, const py::dict& state) { run(rows, state, iterate_restore); });
  m.def("curvature_pass_a", [](const py::dict& state, bool explicit_y, double damping) {
    run({}, state, [&](const Parameters&, const State& s, const Queue& queue) {
      return curvature_pass_a(s, explicit_y, damping, queue);
    });
  });
  m.def("curvature_pass_b", [](const py::dict& state) {
    run({}, state, [](const Parameters&, const State& s, const Queue& queue) {
      return curvature_pass_b(s, queue);
    });
  });
  m.def("curvature_commit", [](const Rows& rows, const py::dict& state, uintptr_t loss,
                               double min_curvature, double max_increase, double max_growth) {
    run(rows, state, [&](const Parameters& list, const State& s, const Queue& queue) {
      return curvature_commit(list, s, pointer<double>(loss), min_curvature, max_increase,
                              max_growth, queue);
    });
  });
  m.def("secant_measure",
        [](const Rows& rows, const py::dict& d, uintptr_t loss, int type, bool maximize) {
          run_search(rows, d,
                     [&](const Parameters& list, const State& s, const Search& search,
                         const Queue& queue) {
                       return secant_measure(list, s, search, {pointer<void>(loss), Type(type)},
                                             maximize, queue);
                     });
        });
  m.def("secant_decide", [](const py::dict& d, double decrease, double noise, double tolerance_grad,
                            double tolerance_change, int64_t max_trials, int64_t max_iter) {
    run_search(
        {}, d, [&](const Parameters&, const State& s, const Search& search, const Queue& queue) {
          return secant_decide(
              s, search, {decrease, noise, tolerance_grad, tolerance_change, max_trials, max_iter},
              queue);
        });
  });
  m.def("secant_keep",
        [](const Rows& rows, const py::dict& d) { run_search(rows, d, secant_keep); });
  m.def("secant_pair", [](const py::dict& d, double absolute, double relative, bool self_scaled) {
    run_search({}, d,
               [&](const Parameters&, const State& s, const Search& search, const Queue& queue) {
                 return secant_pair(s, search, {absolute, relative, self_scaled}, queue);
               });
  });
  m.def("secant_residual", [](const py::dict& d, bool identity) {
    run_search({}, d,
               [&](const Parameters&, const State& s, const Search& search, const Queue& queue) {
                 return secant_residual(s, search, identity, queue);
               });
  });
  m.def("secant_combine", [](const py::dict& d, double lr, double first) {
    run_search({}, d,
               [&](const Parameters&, const State& s, const Search& search, const Queue& queue) {
                 return secant_combine(s, search, lr, first, queue);
               });
  });
  m.def("secant_move",
        [](const Rows& rows, const py::dict& d, std::optional<double> step, double limit) {
          run_search(rows, d,
                     [&](const Parameters& list, const State& s, const Search& search,
                         const Queue& queue) {
                       return secant_move(list, s, search, step ? &*step : nullptr, limit, queue);
                     });
        });
}
