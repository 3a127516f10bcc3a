// bfloat16 for the host emulation; see cuda_runtime.h.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) {
  uint32_t word = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  if (std::isnan(value)) return {0x7fff};
  uint32_t word;
  std::memcpy(&word, &value, 4);
  return {uint16_t((word + 0x7fff + ((word >> 16) & 1)) >> 16)};  // ties to even
}
