#include "products.h"

#include <algorithm>

#include "parallel.h"

namespace adaqn::cpu {
namespace {

/// Depth of a panel of B, which stays in the L1 cache.
constexpr int64_t kDepth = 256;

/// Rows of C whose sums fill the registers, two vectors each.
template <Isa isa>
struct Registers {
  static constexpr int bytes = isa == Isa::avx512 ? 64 : isa == Isa::avx2 ? 32 : 16;
  static constexpr int rows = isa == Isa::avx512 ? 12 : 6;
  static_assert(2 * bytes <= kPanelBytes);
};

template <class T, int bytes>
struct Lanes {
  typedef T Vector __attribute__((vector_size(bytes), aligned(alignof(T)), may_alias));
  static constexpr int count = bytes / sizeof(T);
};

/// `rows` rows and `vectors` vectors of C, for which p.a, p.b and p.c point to their beginnings.
template <int rows, int vectors, int bytes, bool transposed, class T>
inline void multiply_block(const Product<T>& p) {
  using Vector = typename Lanes<T, bytes>::Vector;
  constexpr int lanes = Lanes<T, bytes>::count;
  const int64_t row_step = transposed ? 1 : p.a_stride, step = transposed ? p.a_stride : 1;
  Vector sums[rows][vectors] = {};
  for (int64_t k = 0; k < p.depth; ++k) {
    const Vector* b = reinterpret_cast<const Vector*>(p.b + k * p.b_stride);
    Vector x[vectors];
    for (int v = 0; v < vectors; ++v) x[v] = b[v];
    for (int r = 0; r < rows; ++r) {
      const T a = p.a[r * row_step + k * step];
      for (int v = 0; v < vectors; ++v) sums[r][v] += a * x[v];
    }
  }
  for (int r = 0; r < rows; ++r) {
    for (int v = 0; v < vectors; ++v) {
      Vector& c = *reinterpret_cast<Vector*>(p.c + r * p.c_stride + v * lanes);
      c = p.keep == 0 ? p.scale * sums[r][v] : p.keep * c + p.scale * sums[r][v];
    }
  }
}

/// The same for p.rows rows, which are at most `most`.
template <int most, int vectors, int bytes, bool transposed, class T>
inline void multiply_rows(const Product<T>& p) {
  if constexpr (most > 0) {
    if (p.rows == most) return multiply_block<most, vectors, bytes, transposed>(p);
    multiply_rows<most - 1, vectors, bytes, transposed>(p);
  }
}

/// A panel of one or two vectors, its rows in groups of nearly equal size.
template <int vectors, Isa isa, bool transposed, class T>
inline void multiply_panel(const Product<T>& p) {
  constexpr int most = Registers<isa>::rows, bytes = Registers<isa>::bytes;
  const int64_t groups = (p.rows + most - 1) / most;
  Product<T> part = p;
  for (int64_t group = 0, at = 0; group < groups; ++group, at += part.rows) {
    part.rows = p.rows / groups + (group < p.rows % groups ? 1 : 0);
    part.a = p.a + at * (transposed ? 1 : p.a_stride);
    part.c = p.c + at * p.c_stride;
    multiply_rows<most, vectors, bytes, transposed>(part);
  }
}

template <Isa isa, bool transposed, class T>
inline void multiply_panels(const Product<T>& p) {
  constexpr int64_t lanes = Lanes<T, Registers<isa>::bytes>::count;
  Product<T> part = p;
  for (int64_t j = 0; j < p.columns; j += 2 * lanes) {
    const int64_t end = std::min(p.columns, j + 2 * lanes);
    part.rows = p.upper ? std::min(p.rows, end) : p.rows;
    part.b = p.b + j;
    part.c = p.c + j;
    if (end - j > lanes) {
      multiply_panel<2, isa, transposed>(part);
    } else {
      multiply_panel<1, isa, transposed>(part);
    }
  }
}

template <class T>
struct ProductTask {
  const Product<T>& product;

  template <Isa isa>
  void run(int64_t, int64_t) const {
    Product<T> part = product;
    for (int64_t k = 0; k < product.depth; k += kDepth) {
      part.depth = std::min(kDepth, product.depth - k);
      part.a = product.a + k * (product.transposed ? product.a_stride : 1);
      part.b = product.b + k * product.b_stride;
      part.keep = k == 0 ? product.keep : T(1);
      if (product.transposed) {
        multiply_panels<isa, true>(part);
      } else {
        multiply_panels<isa, false>(part);
      }
    }
  }
};

}  // namespace

template <class T>
void multiply(const Product<T>& product) {
  static const auto run = widest_runner<ProductTask<T>>();
  ProductTask<T> task{product};
  run(0, 1, &task);
}

template void multiply(const Product<float>&);
template void multiply(const Product<double>&);

}  // namespace adaqn::cpu
