// float16 for the host emulation; see cuda_runtime.h.

#pragma once

#include <cmath>
#include <cstdint>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half x) {
  int exponent = (x.bits >> 10) & 31, mantissa = x.bits & 1023;
  float size = exponent == 0    ? std::ldexp(float(mantissa), -24)
               : exponent == 31 ? (mantissa ? NAN : INFINITY)
                                : std::ldexp(float(mantissa | 1024), exponent - 25);
  return x.bits >> 15 ? -size : size;
}

inline __half __float2half_rn(float value) {
  uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  float size = std::fabs(value);
  if (std::isnan(size)) return {0x7fff};
  if (size >= 65520.0f) return {uint16_t(sign | 0x7c00)};
  int exponent = size < 0x1p-14f ? -14 : std::ilogb(size);
  // Spacing of float16 here is 2^(exponent - 10); nearbyint rounds ties to even.
  int units = int(std::nearbyint(std::ldexp(size, 10 - exponent)));
  return {uint16_t(sign | (((exponent + 14) << 10) + units))};
}
