// Work on a long vector: chunks for threads, blocks for caches, wide instructions where there are.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <string_view>
#include <vector>

namespace adaqn::cpu {

/// Runs body(context, begin, end) on sub-ranges that together make 0..count.
using ParallelFor = void (*)(int64_t count, void (*body)(int64_t begin, int64_t end, void* context),
                             void* context);

/// Elements of one task.  Independent of the number of threads, and with it every sum.
constexpr int64_t kChunk = 16384;
/// Elements whose working set, a block of every row of a ring, stays in the L2 cache.
constexpr int64_t kBlock = 8192;
static_assert(kChunk % kBlock == 0);

inline int64_t chunk_count(int64_t size, int64_t length = kChunk) {
  return (size + length - 1) / length;
}

/// Which end of the vector comes first.  A pass that starts where the one before it ended finds
/// the end of it in the cache.
enum class Order { forward, backward };

enum class Isa { baseline, avx2, avx512 };

/// The widest vectors that this machine has and ADAQN_ISA (baseline, avx2, avx512) allows.
Isa machine_isa();

template <class Body>
struct ChunkTask {
  const Body& body;
  Order order;
  int64_t size;
  int64_t length;
  int64_t chunks;

  template <Isa isa>
  void run(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t chunk = order == Order::forward ? i : chunks - 1 - i;
      body(chunk, chunk * length, std::min(size, (chunk + 1) * length));
    }
  }
};

/// Tasks of unequal cost.  A worker that has done with one takes the next.
template <class Body>
struct WorkerTask {
  const Body& body;
  int64_t tasks;
  std::atomic<int64_t>& next;

  template <Isa isa>
  void run(int64_t begin, int64_t end) const {
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t task = next++; task < tasks; task = next++) body(worker, task);
    }
  }
};

// `flatten` inlines the body, with all it calls, into each of these.  The compiler then vectorises
// it for the instructions that this one may use.
template <class Task>
[[gnu::flatten]] void run_baseline(int64_t begin, int64_t end, void* task) {
  static_cast<const Task*>(task)->template run<Isa::baseline>(begin, end);
}

#if defined(__x86_64__) && !defined(ADAQN_ONE_ISA)
template <class Task>
[[gnu::flatten, gnu::target("avx2,fma")]] void run_avx2(int64_t begin, int64_t end, void* task) {
  static_cast<const Task*>(task)->template run<Isa::avx2>(begin, end);
}

template <class Task>
[[gnu::flatten, gnu::target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")]] void run_avx512(
    int64_t begin, int64_t end, void* task) {
  static_cast<const Task*>(task)->template run<Isa::avx512>(begin, end);
}

template <class Task>
auto widest_runner() {
  switch (machine_isa()) {
    case Isa::avx512:
      return run_avx512<Task>;
    case Isa::avx2:
      return run_avx2<Task>;
    default:
      return run_baseline<Task>;
  }
}
#else
template <class Task>
auto widest_runner() {
  return run_baseline<Task>;
}
#endif

/// Calls body(chunk, begin, end) for every chunk begin..end of 0..size.
template <class Body>
void for_chunks(ParallelFor parallel_for, int64_t size, Order order, const Body& body,
                int64_t length = kChunk) {
  ChunkTask<Body> task{body, order, size, length, chunk_count(size, length)};
  parallel_for(task.chunks, widest_runner<ChunkTask<Body>>(), &task);
}

/// Calls body(worker, task) for every task, whose outcome must not depend on the worker.
template <class Body>
void for_tasks(ParallelFor parallel_for, int64_t workers, int64_t tasks, const Body& body) {
  std::atomic<int64_t> next{0};
  WorkerTask<Body> task{body, tasks, next};
  parallel_for(std::min(workers, tasks), widest_runner<WorkerTask<Body>>(), &task);
}

/// Calls body(begin, n) for every block of begin..end.
template <class Body>
inline void for_blocks(int64_t begin, int64_t end, const Body& body) {
  for (int64_t at = begin; at < end; at += kBlock) body(at, std::min(kBlock, end - at));
}

/// One row of `width` sums for every chunk, added up in the order of the chunks.
class PartialSums {
 public:
  PartialSums(int64_t size, int width, int64_t length = kChunk)
      : width_(width), sums_(static_cast<size_t>(chunk_count(size, length) * width)) {}

  double* of(int64_t chunk) { return sums_.data() + chunk * width_; }

  std::vector<double> total() const {
    std::vector<double> total(static_cast<size_t>(width_));
    for (size_t i = 0; i < sums_.size(); ++i) total[i % total.size()] += sums_[i];
    return total;
  }

 private:
  int width_;
  std::vector<double> sums_;
};

}  // namespace adaqn::cpu
