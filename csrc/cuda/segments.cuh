// The segment table: where in the flat vector each parameter lies, passed to kernels by value.

#pragma once

#include <cstdint>
#include <type_traits>

#include "memory.cuh"
#include "slices.cuh"

namespace adaqn::cuda {

/// Groups that one table can tell apart.
constexpr int kTableGroups = 64;

/// Tables come in two capacities, because the driver copies all of it at every launch.  The larger
/// one fills what kernel parameters may take (32,764 bytes) up to the other arguments.
constexpr int kSmallTable = 64, kLargeTable = 1024;

/// Parameters `0..count-1` fill [begin[0], begin[count]) of the flat vector; none of them is empty.
template <int Capacity>
struct Segments {
  static constexpr int kCapacity = Capacity;
  void* param[Capacity];
  const void* grad[Capacity];
  int64_t begin[Capacity + 1];
  uint8_t group[Capacity];  // counted from the table's first group
  Type param_type[Capacity];
  Type grad_type[Capacity];
  int count;
  bool aligned;  // every flat array and ring row begins at a 16-byte boundary
};

template <class Table>
constexpr int kCapacity = std::decay_t<Table>::kCapacity;

template <class Visitor>
__device__ __forceinline__ void with_type(Type type, Visitor visit) {
  if (type == Type::f32) return visit(float{});
  if (type == Type::f64) return visit(double{});
  if (type == Type::bf16) return visit(__nv_bfloat16{});
  visit(__half{});
}

/// Element i of a tensor of any type.
template <class T>
__device__ __forceinline__ T load_element(const void* data, Type type, int64_t i) {
  T value{};
  with_type(type,
            [&](auto tag) { value = convert<T>(static_cast<const decltype(tag)*>(data)[i]); });
  return value;
}

template <class T>
__device__ __forceinline__ void store_element(void* data, Type type, int64_t i, T value) {
  with_type(type, [&](auto tag) {
    static_cast<decltype(tag)*>(data)[i] = convert<decltype(tag)>(value);
  });
}

/// Finds the segment of an element; cheap while successive elements share one.
template <int Capacity>
class Cursor {
 public:
  __device__ explicit Cursor(const Segments<Capacity>& table) : table(table) {}

  /// Makes `segment` that of element i; whether it holds the next `width` elements, too.
  __device__ __forceinline__ bool seek(int64_t i, int width) {
    if (i < begin_ || i >= end_) find(i);
    return i + width <= end_;
  }

  /// Whether the segment moves: a parameter without a gradient stands still.
  __device__ __forceinline__ bool moves() const { return table.grad[segment] != nullptr; }

  /// The packs counted from where the segment begins.
  template <class At>
  __device__ __forceinline__ At in_segment(const At& at) const {
    return at.moved_to(at.begin - begin_);
  }

  const Segments<Capacity>& table;
  int segment = 0;

 private:
  __device__ void find(int64_t i) {
    int low = 0, high = table.count;  // begin[low] <= i < begin[high]
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (table.begin[middle] <= i ? low : high) = middle;
    }
    segment = low;
    begin_ = table.begin[low];
    end_ = table.begin[low + 1];
  }

  int64_t begin_ = 0, end_ = 0;
};

/// Elements of packs that may be unaligned, all in the same way.
template <class T, class U, int V, int N, int W>
__device__ __forceinline__ void load_anywhere(const U* p, const Packs<V, N>& at, T (&out)[W]) {
  if (is_aligned<U, V>(p + at.begin)) {
    load(p, at, out);
  } else {
#pragma unroll
    for (int j = 0; j < W; ++j) out[j] = convert<T>(p[at.begin + j / V * at.step + j % V]);
  }
}

template <class T, class U, int V, int N, int W>
__device__ __forceinline__ void store_anywhere(U* p, const Packs<V, N>& at, const T (&values)[W]) {
  if (is_aligned<U, V>(p + at.begin)) {
    store(p, at, values);
  } else {
#pragma unroll
    for (int j = 0; j < W; ++j) p[at.begin + j / V * at.step + j % V] = convert<U>(values[j]);
  }
}

/// Elements of packs in the cursor's segment; zero where it has no gradient.
template <class T, class At, int W, int Capacity>
__device__ __forceinline__ void load_grad(const Cursor<Capacity>& cursor, const At& at, T (&g)[W]) {
#pragma unroll
  for (int j = 0; j < W; ++j) g[j] = 0;
  const void* grad = cursor.table.grad[cursor.segment];
  if (!grad) return;
  with_type(cursor.table.grad_type[cursor.segment], [&](auto tag) {
    load_anywhere(static_cast<const decltype(tag)*>(grad), cursor.in_segment(at), g);
  });
}

template <class T, class At, int W, int Capacity>
__device__ __forceinline__ void load_param(const Cursor<Capacity>& cursor, const At& at,
                                           T (&w)[W]) {
  const void* param = cursor.table.param[cursor.segment];
  with_type(cursor.table.param_type[cursor.segment], [&](auto tag) {
    load_anywhere(static_cast<const decltype(tag)*>(param), cursor.in_segment(at), w);
  });
}

template <class T, class At, int W, int Capacity>
__device__ __forceinline__ void store_param(const Cursor<Capacity>& cursor, const At& at,
                                            const T (&w)[W]) {
  void* param = cursor.table.param[cursor.segment];
  with_type(cursor.table.param_type[cursor.segment], [&](auto tag) {
    store_anywhere(static_cast<decltype(tag)*>(param), cursor.in_segment(at), w);
  });
}

/// Calls visit(packs) for packs that make up this block's slice of the table's elements, N or one
/// at a time, with the cursor at their segment.
template <class T, class H, int N = 1, int Capacity, class Visitor>
__device__ __forceinline__ void visit_segments(Cursor<Capacity>& cursor, Order order,
                                               Visitor visit) {
  const Segments<Capacity>& table = cursor.table;
  visit_slice<kWidth<H>, N, kThreads<T>>(
      table.begin[0], table.begin[table.count], table.aligned, order,
      [&](int64_t i, int width) { return cursor.seek(i, width); }, visit);
}

}  // namespace adaqn::cuda
