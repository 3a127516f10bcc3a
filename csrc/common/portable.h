// What lets one source serve host and device.
#pragma once

#ifdef __CUDACC__
#define ADAQN_HOST_DEVICE __host__ __device__
#else
#define ADAQN_HOST_DEVICE
#endif

namespace adaqn {

/// Whether x is neither infinite nor NaN.  Needs strict floating point: no -ffast-math.
template <class T>
ADAQN_HOST_DEVICE inline bool is_finite(T x) {
  return x - x == T(0);
}

/// A product of vectors, or 0 where it has overflowed: a step without that pair's share.
ADAQN_HOST_DEVICE inline double finite_or_zero(double x) { return is_finite(x) ? x : 0; }

}  // namespace adaqn
