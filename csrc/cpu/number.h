// Storage formats of numbers, and exact, branch-free conversions that vectorise.
#pragma once

#include <cstdint>
#include <cstring>

namespace adaqn::cpu {

enum class Dtype { float32, float64, bfloat16, float16 };

/// The dtype of arithmetic in T.
template <class T>
constexpr Dtype dtype_of = sizeof(T) == sizeof(double) ? Dtype::float64 : Dtype::float32;

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(BFloat16 x) { return float_of(uint32_t{x.bits} << 16); }

inline float widen(Half x) {
  constexpr uint32_t infinity = 0x1fu << 23, rebias = (127u - 15u) << 23;
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13;
  const uint32_t exponent = magnitude & infinity;
  const uint32_t normal = magnitude + rebias + (exponent == infinity ? rebias : 0);
  // A subnormal is what is left of 2^-14 plus it.
  const float small = float_of(magnitude + rebias + (1u << 23)) - float_of(rebias + (1u << 23));
  const uint32_t sign = (x.bits & 0x8000u) << 16;
  return float_of((exponent == 0 ? bits_of(small) : normal) | sign);
}

inline void round_to(float& to, double x) { to = static_cast<float>(x); }
inline void round_to(double& to, double x) { to = x; }

/// To nearest, ties to even; every NaN becomes the same quiet one.
inline void round_to(BFloat16& to, float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  to.bits = static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
}

/// To nearest, ties to even; every NaN becomes the same quiet one.
inline void round_to(Half& to, float x) {
  constexpr uint32_t rebias = (127u - 15u) << 23, limit = (127u + 16u) << 23;
  constexpr uint32_t subnormal_unit = (127u - 15u + 23u - 10u + 1u) << 23;
  const uint32_t sign = bits_of(x) & 0x80000000u, magnitude = bits_of(x) ^ sign;
  const uint32_t normal = (magnitude - rebias + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  // Adding this power of two leaves the subnormal's bits, rounded, at the bottom.
  const uint32_t subnormal =
      bits_of(float_of(magnitude) + float_of(subnormal_unit)) - subnormal_unit;
  uint32_t half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= limit ? 0x7c00u : half;
  half = x != x ? 0x7e00u : half;
  to.bits = static_cast<uint16_t>(half | sign >> 16);
}

template <class To, class From>
inline To convert(From x) {
  To to;
  if constexpr (sizeof(To) == sizeof(uint16_t)) {
    round_to(to, static_cast<float>(widen(x)));
  } else {
    round_to(to, widen(x));
  }
  return to;
}

}  // namespace adaqn::cpu
