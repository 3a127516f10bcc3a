// The operations of adaqn_cuda/reference on a CUDA device, for callers without torch.
//
// Every function enqueues kernels on a stream and returns: it allocates nothing, waits for nothing
// and reads no device memory.  Names, shapes and meaning of the buffers are those of
// adaqn_cuda/state/arena.py and reference.  Rings are rows of `numel` elements, `stride` apart.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../common/secant.h"
#include "strided.h"

namespace adaqn::cuda {

enum class Type : uint8_t { f32, f64, bf16, f16 };

inline int bytes_of(Type type) { return type == Type::f64 ? 8 : type == Type::f32 ? 4 : 2; }

/// Pairs of a step whose passes keep a sum for each; other operations take any number.
constexpr int kMaxHistory = 64;

/// A parameter: contiguous, in device memory.
struct Tensor {
  void* param;
  const void* grad;  // null: the parameter stands still
  int64_t numel;
  int32_t group;  // ascending from 0 over the list
  int32_t kind;   // of its averages: one launch holds those of one kind
  Type param_type, grad_type;
};

struct Parameters {
  const Tensor* tensors;  // host memory
  int64_t count;
};

struct Ring {
  void* data;
  int64_t stride;  // elements between two rows
};

/// Pointers into device memory; an operation that does not use one leaves it null.
struct State {
  int64_t numel;        // d
  int64_t fisher_size;  // rows of `fisher`; 1 where there are none
  int32_t slots;        // rows of the pair rings: history_size + 1; 0 without pairs
  Type type;            // vectors: f32 or f64
  Type pair_type;       // s_ring and y_ring: as `type`, or bf16
  Type fisher_type;     // fisher: as `type`, or bf16
  void* accumulator;    // null: the scalar initial matrix
  void* momentum;       // null: none
  void* iterate_sum;    // null: iterates are not summed
  void* anchor;
  void* direction;
  void* image;                  // null: pairs are not damped
  Ring s_ring, y_ring, fisher;  // fisher.data null: gradients are not kept
  double* gram;
  double* moments;
  double* losses;
  double* projections;
  double* images;
  double* weights;
  double* column;
  int64_t* counters;
};

/// From a gradient as given to the one to descend.
struct Scaling {
  const float* grad_scale;  // device memory; null: 1
  const float* found_inf;   // device memory; null: 0
  bool maximize;
  double max_grad_norm;  // what it is clipped to; infinite: it is not
};

/// Averages of gradients:  m = beta m + (1 - beta) g;  v = keep v + add g^2;
/// D = 1 / sqrt(correction v + eps).  An operation on several kinds takes them by kind, from host
/// memory.
struct Averages {
  double beta, keep, add, eps;
  bool correct_bias;
};

/// Per group; the device arrays, where not null, take precedence.
struct Rates {
  const double *lr, *weight_decay;                // host memory
  const double *lr_tensor, *weight_decay_tensor;  // device memory
};

/// The Kronecker-factored initial matrix, with v in State::accumulator; see ../common/kronecker.h.
struct Kronecker {
  const int64_t* table;  // host memory, `matrices` rows
  int64_t matrices;
  void *factors, *bases;  // of State::type
  double* square;         // the average |g|^2
  double square_keep;     // its decay
  int64_t call, interval;
  const int32_t* kinds;  // of each matrix's averages, host memory; null: all of kind 0
};

/// What L-BFGS on a deterministic loss has beside State, of which it uses the pairs, `direction`,
/// `projections`, `images` and `counters`; see adaqn_cuda/reference/secant.py.
struct Search {
  void *trial, *gradient, *origin, *residual;  // of State::type
  double *scales, *words;
};

/// A number in device memory, of any type.
struct Number {
  const void* data;
  Type type;
};

/// Where to run.  `workspace` is device memory of `workspace_bytes`, with any content, that no
/// other work on the device uses until this operation is done.
struct Queue {
  cudaStream_t stream;
  double* workspace;
};

size_t workspace_bytes(const Parameters&, const State&);

/// `max_direction` is the largest |p| / |H0 q|; infinite without a cap.
cudaError_t direction_step(const Parameters&, const State&, const Scaling&, const Averages&,
                           double max_direction, const Rates&, const Queue&);
cudaError_t direction_pass1(const Parameters&, const State&, const Scaling&, double beta,
                            const Queue&);

/// `identity`: D = 1 without an accumulator, and `images` wait for direction_images.
cudaError_t direction_pass2(const Parameters&, const State&, const Scaling&,
                            const Averages* by_kind, bool identity, const Queue&);
cudaError_t direction_images(const State&, const Queue&);
cudaError_t direction_pass3(const Parameters&, const State&, double beta, double max_direction,
                            const Rates&, const Queue&);

/// A whole step without pairs: no slots, no sums of iterates, no direction.
cudaError_t diagonal_step(const Parameters&, const State&, const Scaling&, const Averages* by_kind,
                          const Rates&, const Queue&);

size_t workspace_bytes(const Parameters&, const State&, const Kronecker&);

/// The gradient enters L, R, their bases, v and |g|^2, after pass 1.
cudaError_t kronecker_accumulate(const Parameters&, const State&, const Kronecker&, const Scaling&,
                                 const Averages* by_kind, const Queue&);

/// direction = H0 direction, or with `inverse` H0^-1 direction; `pending` steps are not counted.
cudaError_t kronecker_apply(const State&, const Kronecker&, const Averages* by_kind, int pending,
                            bool inverse, const Queue&);

/// A whole step without pairs: no slots, no sums of iterates, no direction.
cudaError_t kronecker_step(const Parameters&, const State&, const Kronecker&, const Scaling&,
                           const Averages* by_kind, const Rates&, const Queue&);

/// `direction` takes the parameters set aside.
cudaError_t iterate_swap(const Parameters&, const State&, const Queue&);
cudaError_t iterate_restore(const Parameters&, const State&, const Queue&);

/// `explicit_y`: y is the one row of `fisher`.
cudaError_t curvature_pass_a(const State&, bool explicit_y, double damping, const Queue&);
cudaError_t curvature_pass_b(const State&, const Queue&);

/// `monitored_loss`: one word in device memory, or null without a monitor.
cudaError_t curvature_commit(const Parameters&, const State&, const double* monitored_loss,
                             double min_curvature, double max_increase, double max_growth,
                             const Queue&);

// ---- L-BFGS on a deterministic loss: any number of pairs; what comes next is read from
// Search::words.

size_t secant_workspace_bytes(const Parameters&, const State&);

cudaError_t secant_measure(const Parameters&, const State&, const Search&, const Number& loss,
                           bool maximize, const Queue&);
cudaError_t secant_decide(const State&, const Search&, const SearchRule&, const Queue&);
cudaError_t secant_keep(const Parameters&, const State&, const Search&, const Queue&);
cudaError_t secant_pair(const State&, const Search&, const PairRule&, const Queue&);

/// `identity`: `images` wait for direction_images.
cudaError_t secant_residual(const State&, const Search&, bool identity, const Queue&);
cudaError_t secant_combine(const State&, const Search&, double lr, double first, const Queue&);

/// `step`: null for that of the words; in host memory.
cudaError_t secant_move(const Parameters&, const State&, const Search&, const double* step,
                        double limit, const Queue&);

// ---- tensors that are not contiguous

/// `to_dense`: from where they lie to contiguous memory; else back.
cudaError_t copy_strided(const Strided* tensors, int64_t count, bool to_dense, cudaStream_t);

// ---- loading: the driver loads a kernel at its first launch, which a graph that is being captured
// may not allow.  These load the kernels of an optimizer beforehand.

/// What they are instances for.
struct Kinds {
  Type vectors;
  Type pairs, fisher;  // as `vectors`, or bf16
};

/// Of the step and the pair update; without pairs, of the step alone.
cudaError_t load_kernels(const Kinds&, bool has_pairs, bool kronecker);

/// Of L-BFGS on a deterministic loss.
cudaError_t load_search_kernels(const Kinds&, bool kronecker);

}  // namespace adaqn::cuda
