// Loads and stores of a few consecutive elements: 16 bytes at a time where aligned, one by one
// where not, converted from and to the type of arithmetic.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "adaqn_cuda.h"

namespace adaqn::cuda {

// ------------------------------------------------------------------ conversions

template <class T>
__device__ __forceinline__ T convert(float x) {
  return T(x);
}
template <class T>
__device__ __forceinline__ T convert(double x) {
  return T(x);
}
template <class T>
__device__ __forceinline__ T convert(__nv_bfloat16 x) {
  return T(__bfloat162float(x));
}
template <class T>
__device__ __forceinline__ T convert(__half x) {
  return T(__half2float(x));
}
// Narrow types are reached through float, as in torch.
template <>
__device__ __forceinline__ __nv_bfloat16 convert<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 convert<__nv_bfloat16>(double x) {
  return __float2bfloat16_rn(float(x));
}
template <>
__device__ __forceinline__ __half convert<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __half convert<__half>(double x) {
  return __float2half_rn(float(x));
}

// ------------------------------------------------------------------ vectors

/// What the cache should expect: `keep` what is read again soon, `stream` what is not.
enum class Cache { keep, stream };

template <int bytes>
struct WordOf {
  using type = uint4;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<4> {
  using type = unsigned;
};
template <>
struct WordOf<2> {
  using type = unsigned short;
};

/// The widest access that moves W elements of U.
template <class U, int W>
using Word = typename WordOf<int(W * sizeof(U))>::type;

/// W elements as the compiler moves them with the fewest instructions.
template <class U, int W>
struct alignas(Word<U, W>) Vector {
  U elements[W];
};

template <class U, int W>
__host__ __device__ __forceinline__ bool is_aligned(const U* p) {
  return reinterpret_cast<uintptr_t>(p) % sizeof(Word<U, W>) == 0;
}

/// W elements at the aligned address p.
template <Cache cache, class U, int W>
__device__ __forceinline__ void load_vector(const U* p, U (&out)[W]) {
  constexpr int n = W * sizeof(U) / sizeof(Word<U, W>);
  Word<U, W> words[n];
  const auto* source = reinterpret_cast<const Word<U, W>*>(p);
#pragma unroll
  for (int k = 0; k < n; ++k) {
    words[k] = cache == Cache::stream ? __ldcs(source + k) : source[k];
  }
  memcpy(out, words, sizeof(words));
}

// ------------------------------------------------------------------ packs

/// W consecutive elements of the flat vector from `begin` on: all in one segment, and aligned in
/// every flat array.
template <int W_>
struct Pack {
  static constexpr int W = W_;
  int64_t begin;
};

template <class AnyPack>
constexpr int kPackWidth = std::decay_t<AnyPack>::W;

/// Elements of a pack from the flat array p.
template <Cache cache = Cache::keep, class T, class U, int W>
__device__ __forceinline__ void load(const U* p, const Pack<W>& at, T (&out)[W]) {
  U raw[W];
  load_vector<cache>(p + at.begin, raw);
#pragma unroll
  for (int j = 0; j < W; ++j) out[j] = convert<T>(raw[j]);
}

template <class T, class U, int W>
__device__ __forceinline__ void store(U* p, const Pack<W>& at, const T (&values)[W]) {
  Vector<U, W> raw;
#pragma unroll
  for (int j = 0; j < W; ++j) raw.elements[j] = convert<U>(values[j]);
  *reinterpret_cast<Vector<U, W>*>(p + at.begin) = raw;
}

}  // namespace adaqn::cuda
