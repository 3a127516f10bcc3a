// From dtypes and flags at run time to types at compile time.
#pragma once

#include <type_traits>

#include "number.h"

namespace adaqn::cpu {

/// Calls body with a T: the dtype of the vectors.
template <class Body>
void with_vector_type(Dtype dtype, const Body& body) {
  if (dtype == Dtype::float64) {
    body(double());
  } else {
    body(float());
  }
}

/// Calls body with std::true_type or std::false_type.
template <class Body>
inline void with_flag(bool flag, const Body& body) {
  if (flag) {
    body(std::true_type());
  } else {
    body(std::false_type());
  }
}

/// Calls body with a ring's element type: T or BFloat16.
template <class T, class Body>
void with_ring_type(Dtype dtype, const Body& body) {
  if (dtype == Dtype::bfloat16) {
    body(BFloat16());
  } else {
    body(T());
  }
}

}  // namespace adaqn::cpu
