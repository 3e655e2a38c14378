// Pieces of a matrix as cells, small enough to stay in the nearest cache.
#pragma once

#include <cstring>

#include "philox.h"
#include "vector.h"

namespace lorafast {

// `rows` rows of n numbers as cells along the rows: [rows][stride], zero up to a whole vector.
template <class T>
inline void stage_rows(const Matrix<const T>& x, int64_t m0, int64_t rows, int64_t n, float* to, int64_t stride) {
  constexpr int step = W * per_cell<T>;
  for (int64_t i = 0; i < rows; ++i, to += stride)
    for (int64_t k = 0; k < n; k += step) store(to + k / per_cell<T>, load_cells<T, Read::ending>(x.row(m0 + i) + k, n - k));
}

template <class T, Read how>
inline void stage_columns_as(const Matrix<const T>& x, int64_t m0, int64_t rows, int64_t k0, int64_t n, const uint8_t* bits,
                             int64_t bits_stride, float* to, int64_t stride) {
  for (int64_t i = 0; i < rows; i += per_cell<T>, to += stride) {
    const T* a = x.row(m0 + i) + k0;
    const uint8_t* keep_a = bits ? bits + i * bits_stride : nullptr;
    // The columns that come next lie far from each other, where no processor expects them.
    for (int64_t row = 0; row < per_cell<T>; ++row) __builtin_prefetch(a + row * x.stride + n);
    if constexpr (paired<T>) {
      const bool both = i + 1 < rows;
      for (int64_t k = 0; k < n; k += 2 * W) {
        const Vector u = load_cells<T, how>(a + k, n - k, bits ? keep_a + k / 8 : nullptr);
        const Vector v = both ? load_cells<T, how>(a + x.stride + k, n - k, bits ? keep_a + bits_stride + k / 8 : nullptr) : zero();
        interleave(u, v, to + k);
      }
    } else {
      for (int64_t k = 0; k < n; k += W) store(to + k, load_cells<T, how>(a + k, n - k, bits ? keep_a + k / 8 : nullptr));
    }
  }
}

// The same as cells whose pairs lie along the tokens: [cells<T>(rows)][stride]. bits: which numbers are kept, or null.
template <class T>
inline void stage_columns(const Matrix<const T>& x, int64_t m0, int64_t rows, int64_t k0, int64_t n, const uint8_t* bits,
                          int64_t bits_stride, float* to, int64_t stride) {
  if (n % (W * per_cell<T>))
    stage_columns_as<T, Read::ending>(x, m0, rows, k0, n, bits, bits_stride, to, stride);
  else if (bits)
    stage_columns_as<T, Read::masked>(x, m0, rows, k0, n, bits, bits_stride, to, stride);
  else
    stage_columns_as<T, Read::whole>(x, m0, rows, k0, n, nullptr, 0, to, stride);
}

}  // namespace lorafast
