// A flat vector whose elements live in many tensors of any layout and dtype.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "number.h"

namespace adaqn::cpu {

/// Sizes and strides of a tensor that is not contiguous; borrowed.
struct Layout {
  const int64_t* sizes;
  const int64_t* strides;
  int64_t dim;
};

/// A tensor's part of the flat vector: elements start..end, in the tensor's logical order.
struct Segment {
  void* data;  ///< null: all zero
  Dtype dtype;
  bool contiguous;
  Layout layout;
  int64_t start;
  int64_t end;

  /// Whether there is an array of this dtype.
  bool holds(Dtype wanted) const { return data != nullptr && contiguous && dtype == wanted; }
};

/// The memory offset of one element after the other.
class Walk {
 public:
  Walk(const Layout& layout, int64_t element) : layout_(layout), index_(layout.dim) {
    for (int64_t k = layout.dim - 1; k >= 0; --k) {
      index_[k] = element % layout.sizes[k];
      element /= layout.sizes[k];
      offset_ += index_[k] * layout.strides[k];
    }
  }

  int64_t offset() const { return offset_; }

  void next() {
    for (int64_t k = layout_.dim - 1; k >= 0; --k) {
      offset_ += layout_.strides[k];
      if (++index_[k] < layout_.sizes[k]) return;
      offset_ -= layout_.sizes[k] * layout_.strides[k];
      index_[k] = 0;
    }
  }

 private:
  const Layout& layout_;
  std::vector<int64_t> index_;
  int64_t offset_ = 0;
};

template <class T, class E>
[[gnu::noinline]] void load_strided(const Segment& segment, int64_t first, int64_t n, T* to) {
  Walk walk(segment.layout, first);
  for (int64_t i = 0; i < n; ++i, walk.next()) {
    to[i] = convert<T>(static_cast<const E*>(segment.data)[walk.offset()]);
  }
}

template <class T, class E>
[[gnu::noinline]] void store_strided(const Segment& segment, int64_t first, int64_t n,
                                     const T* from) {
  Walk walk(segment.layout, first);
  for (int64_t i = 0; i < n; ++i, walk.next()) {
    static_cast<E*>(segment.data)[walk.offset()] = convert<E>(from[i]);
  }
}

template <class T, class E>
inline void load_elements(const Segment& segment, int64_t first, int64_t n, T* to) {
  if (!segment.contiguous) return load_strided<T, E>(segment, first, n, to);
  const E* from = static_cast<const E*>(segment.data) + first;
  for (int64_t i = 0; i < n; ++i) to[i] = convert<T>(from[i]);
}

template <class T, class E>
inline void store_elements(const Segment& segment, int64_t first, int64_t n, const T* from) {
  if (!segment.contiguous) return store_strided<T, E>(segment, first, n, from);
  E* to = static_cast<E*>(segment.data) + first;
  for (int64_t i = 0; i < n; ++i) to[i] = convert<E>(from[i]);
}

/// Elements up to `end`, which all have a tensor or all have none.
struct Run {
  int64_t end;
  bool present;
};

/// Rows of a tile: `length` elements each, `apart` elements from one to the next.
struct Rows {
  int64_t begin;
  int64_t count;
  int64_t length;
  int64_t apart;
};

/// Calls body with an element of the dtype.
template <class Body>
inline void with_element_type(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::float32:
      return body(float());
    case Dtype::float64:
      return body(double());
    case Dtype::bfloat16:
      return body(BFloat16());
    case Dtype::float16:
      return body(Half());
  }
}

/// Segments in order, without gaps and without empty ones.
class Scattered {
 public:
  void append(void* data, Dtype dtype, bool contiguous, const Layout& layout, int64_t numel) {
    if (numel == 0) return;
    complete_ = complete_ && data != nullptr;
    segments_.push_back({data, dtype, contiguous, layout, size(), size() + numel});
  }

  /// The run that starts with element `begin`, cut off at `end`.
  Run run(int64_t begin, int64_t end) const {
    if (complete_) return {end, true};
    auto segment = find(begin);
    const bool present = segment->data != nullptr;
    int64_t run_end = begin;
    for (; segment != segments_.end() && run_end < end; ++segment) {
      if ((segment->data != nullptr) != present) break;
      run_end = segment->end;
    }
    return {std::min(run_end, end), present};
  }

  int64_t size() const { return segments_.empty() ? 0 : segments_.back().end; }

  /// Elements begin..begin+n, as T.
  template <class T>
  void load(int64_t begin, int64_t n, T* to) const {
    for_parts(begin, n, [&](const Segment& segment, int64_t first, int64_t part, int64_t at) {
      if (segment.data == nullptr) {
        std::fill_n(to + at, part, T(0));
        return;
      }
      with_element_type(segment.dtype, [&](auto element) {
        load_elements<T, decltype(element)>(segment, first, part, to + at);
      });
    });
  }

  /// Sets elements begin..begin+n, rounded to the dtype of each.
  template <class T>
  void store(int64_t begin, int64_t n, const T* from) const {
    for_parts(begin, n, [&](const Segment& segment, int64_t first, int64_t part, int64_t at) {
      with_element_type(segment.dtype, [&](auto element) {
        store_elements<T, decltype(element)>(segment, first, part, from + at);
      });
    });
  }

  /// Rows of `length` elements of one tensor, which has data, as T.
  template <class T>
  void load_rows(const Rows& rows, T* to, int64_t stride) const {
    const Segment& segment = *find(rows.begin);
    with_element_type(segment.dtype, [&](auto element) {
      for (int64_t k = 0; k < rows.count; ++k) {
        const int64_t first = rows.begin - segment.start + k * rows.apart;
        load_elements<T, decltype(element)>(segment, first, rows.length, to + k * stride);
      }
    });
  }

  /// Sets such rows, rounded to the tensor's dtype.
  template <class T>
  void store_rows(const Rows& rows, const T* from, int64_t stride) const {
    const Segment& segment = *find(rows.begin);
    with_element_type(segment.dtype, [&](auto element) {
      for (int64_t k = 0; k < rows.count; ++k) {
        const int64_t first = rows.begin - segment.start + k * rows.apart;
        store_elements<T, decltype(element)>(segment, first, rows.length, from + k * stride);
      }
    });
  }

  /// The same where they are, if one tensor holds them all, contiguous and as T; else in `block`.
  template <class T>
  T* view(int64_t begin, int64_t n, T* block) const {
    const auto segment = find(begin);
    if (begin + n <= segment->end && segment->holds(dtype_of<T>)) {
      return static_cast<T*>(segment->data) + (begin - segment->start);
    }
    load(begin, n, block);
    return block;
  }

 private:
  /// The segment of an element.
  std::vector<Segment>::const_iterator find(int64_t element) const {
    return std::upper_bound(
        segments_.begin(), segments_.end(), element,
        [](int64_t at, const Segment& candidate) { return at < candidate.end; });
  }

  /// Calls body(segment, first, part, at) for every segment's share of begin..begin+n: `part`
  /// elements from the segment's `first` on, which are `at` elements behind begin.
  template <class Body>
  void for_parts(int64_t begin, int64_t n, const Body& body) const {
    auto segment = find(begin);
    for (int64_t at = 0; at < n; ++segment) {
      const int64_t first = begin + at - segment->start;
      const int64_t part = std::min(n - at, segment->end - segment->start - first);
      body(*segment, first, part, at);
      at += part;
    }
  }

  std::vector<Segment> segments_;
  bool complete_ = true;  ///< no segment is without data
};

}  // namespace adaqn::cpu
