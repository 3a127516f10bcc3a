// Scratch memory that is laid out once, by its size, and used by one worker at a time.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>

namespace adaqn::cpu {

/// Hands out pieces that begin with a cache line.  Without memory it only counts the bytes.
class Scratch {
 public:
  Scratch() = default;
  explicit Scratch(std::byte* memory) : memory_(memory) {}

  template <class T>
  T* take(int64_t count) {
    std::byte* piece = memory_ == nullptr ? nullptr : memory_ + bytes_;
    bytes_ += (count * static_cast<int64_t>(sizeof(T)) + kLine - 1) / kLine * kLine;
    return reinterpret_cast<T*>(piece);
  }

  int64_t bytes() const { return bytes_; }

  static constexpr int64_t kLine = 64;

 private:
  std::byte* memory_ = nullptr;
  int64_t bytes_ = 0;
};

/// The memory of all workers, `bytes` each.
class Workspace {
 public:
  Workspace(int64_t workers, int64_t bytes)
      : bytes_(bytes), memory_(new std::byte[workers * bytes + Scratch::kLine]) {
    const auto address = reinterpret_cast<uintptr_t>(memory_.get());
    first_ = memory_.get() + (Scratch::kLine - address % Scratch::kLine) % Scratch::kLine;
  }

  Scratch of(int64_t worker) const { return Scratch(first_ + worker * bytes_); }

 private:
  int64_t bytes_;
  std::unique_ptr<std::byte[]> memory_;
  std::byte* first_;
};

}  // namespace adaqn::cpu
