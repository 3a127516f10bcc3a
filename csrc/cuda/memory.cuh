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

/// N times V consecutive elements of the flat vector from `begin` on, `step` elements apart: all in
/// one segment, and aligned in every flat array.  What is loaded of all is in flight at a time.
template <int V, int N>
struct Packs {
  static constexpr int W = V * N;
  int64_t begin, step = 0;

  __device__ __forceinline__ Packs moved_to(int64_t other) const { return {other, step}; }
};

template <int W>
using Pack = Packs<W, 1>;

template <class AnyPack>
constexpr int kPackWidth = std::decay_t<AnyPack>::W;

/// Elements of packs from the flat array p.
template <Cache cache = Cache::keep, class T, class U, int V, int N, int W>
__device__ __forceinline__ void load(const U* p, const Packs<V, N>& at, T (&out)[W]) {
  U raw[N][V];
#pragma unroll
  for (int n = 0; n < N; ++n) load_vector<cache>(p + at.begin + n * at.step, raw[n]);
#pragma unroll
  for (int j = 0; j < W; ++j) out[j] = convert<T>(raw[j / V][j % V]);
}

template <class T, class U, int V, int N, int W>
__device__ __forceinline__ void store(U* p, const Packs<V, N>& at, const T (&values)[W]) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
    Vector<U, V> raw;
#pragma unroll
    for (int j = 0; j < V; ++j) raw.elements[j] = convert<U>(values[n * V + j]);
    *reinterpret_cast<Vector<U, V>*>(p + at.begin + n * at.step) = raw;
  }
}

}  // namespace adaqn::cuda
