// Copies of parts of a matrix as cells, small enough to stay in the L1 cache.
#pragma once

#include <cstring>

#include "philox.h"
#include "vector.h"

namespace lorafast {

// Rows m0 .. m0+rows, n numbers each, as cells along the rows: [rows][stride], padded with zeros to
// a whole vector.
template <class T>
inline void stage_rows(const Matrix<const T>& x, int64_t m0, int64_t rows, int64_t n, float* to,
                       int64_t stride) {
  constexpr int step = W * per_cell<T>;
  for (int64_t i = 0; i < rows; ++i, to += stride)
    for (int64_t k = 0; k < n; k += step)
      store(to + k / per_cell<T>, load_cells<T, Read::partial>(x.row(m0 + i) + k, n - k));
}

// stage_columns for one way of reading.
template <class T, Read how>
inline void stage_columns_as(const Matrix<const T>& x, int64_t m0, int64_t rows, int64_t k0,
                             int64_t n, const uint8_t* bits, int64_t bits_stride, float* to,
                             int64_t width, int64_t block_stride) {
  constexpr int64_t step = W * per_cell<T>;
  for (int64_t i = 0; i < rows; i += per_cell<T>, to += width) {
    const T* a = x.row(m0 + i) + k0;
    const uint8_t* keep_a = bits ? bits + i * bits_stride : nullptr;
    const bool both = paired<T> && i + 1 < rows;
    float* block = to;
    for (int64_t first = 0; first < n; first += width, block += block_stride)
      for (int64_t k = first; k < min(first + width, n); k += step) {
        const Vector u = load_cells<T, how>(a + k, n - k, bits ? keep_a + k / 8 : nullptr);
        if constexpr (paired<T>) {
          const uint8_t* keep_b = bits ? keep_a + bits_stride + k / 8 : nullptr;
          interleave(u, both ? load_cells<T, how>(a + x.stride + k, n - k, keep_b) : zero(),
                     block + (k - first));
        } else {
          store(block + (k - first), u);
        }
      }
  }
}

// The same numbers as cells whose pairs lie along the rows' axis (tokens), in blocks of `width`
// columns: [n / width][cells<T>(rows)][width], with `block_stride` cells from one block to the
// next. bits: the keep bits, or null. The loop reads a row to its end before the next one: rows
// whose stride is a power of two map to the same cache sets and would evict each other between two
// blocks of columns.
template <class T>
inline void stage_columns(const Matrix<const T>& x, int64_t m0, int64_t rows, int64_t k0, int64_t n,
                          const uint8_t* bits, int64_t bits_stride, float* to, int64_t width,
                          int64_t block_stride) {
  if (n % (W * per_cell<T>))
    stage_columns_as<T, Read::partial>(x, m0, rows, k0, n, bits, bits_stride, to, width,
                                       block_stride);
  else if (bits)
    stage_columns_as<T, Read::masked>(x, m0, rows, k0, n, bits, bits_stride, to, width,
                                      block_stride);
  else
    stage_columns_as<T, Read::full>(x, m0, rows, k0, n, nullptr, 0, to, width, block_stride);
}

}  // namespace lorafast
