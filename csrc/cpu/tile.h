// The inner loops of all products: small tiles of sums, held in registers.
#pragma once

#include <type_traits>

#include "vector.h"

namespace lorafast {

// sums[i][j] += Σ_p a[i,p] b[p, jW:(j+1)W] for p < length, with each cell of a broadcast to all
// lanes. Strides, in cells: a_row between the rows of a, a_step and b_step between the steps p.
template <bool pairs, int I, int J>
inline __attribute__((always_inline)) void multiply_broadcast(const float* a, int64_t a_row,
                                                              int64_t a_step, const float* b,
                                                              int64_t b_step, int64_t length,
                                                              Vector (&sums)[I][J]) {
  for (int64_t p = 0; p < length; ++p, a += a_step, b += b_step) {
    Vector row[J];
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) row[j] = load(b + j * W);
#pragma GCC unroll 12
    for (int i = 0; i < I; ++i) {
      const Vector cell = broadcast(a[i * a_row]);
#pragma GCC unroll 4
      for (int j = 0; j < J; ++j) sums[i][j] = mac<pairs>(sums[i][j], cell, row[j]);
    }
  }
}

// sums[i][j] += a's row i times b's rank j, summed lane by lane over the vectors of n numbers. The
// rows of a are a_row numbers apart. bits: the keep bits of a, bits_row bytes apart, or null. b
// holds J ranks of W cells for each vector of a. The first `prefetched` rows from `next` on are
// prefetched meanwhile.
template <class T, Read how, int prefetched, int I, int J>
inline __attribute__((always_inline)) void multiply_lanes(const T* a, int64_t a_row, int64_t n,
                                                          const T* next, const uint8_t* bits,
                                                          int64_t bits_row, const float* b,
                                                          Vector (&sums)[I][J]) {
  for (int64_t k = 0; k < n; k += W * per_cell<T>, b += J * W) {
    Vector rank[J];
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) rank[j] = load(b + j * W);
#pragma GCC unroll 12
    for (int i = 0; i < I; ++i) {
      if (i < prefetched && k * sizeof(T) % 64 == 0) __builtin_prefetch(next + i * a_row + k);
      const Vector row = load_cells<T, how>(a + i * a_row + k, n - k,
                                            bits ? bits + i * bits_row + k / 8 : nullptr);
#pragma GCC unroll 4
      for (int j = 0; j < J; ++j) sums[i][j] = mac<paired<T>>(sums[i][j], row, rank[j]);
    }
  }
}

// Sets all sums to 0.
template <int I, int J>
inline __attribute__((always_inline)) void clear(Vector (&sums)[I][J]) {
#pragma GCC unroll 12
  for (int i = 0; i < I; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) sums[i][j] = zero();
}

// Calls body(I, first row) so that tiles of I = Largest, 4 and 1 rows cover any number of rows.
template <int Largest, class Body>
inline void for_row_tiles(int64_t rows, Body&& body) {
  int64_t i = 0;
  for (; i + Largest <= rows; i += Largest) body(std::integral_constant<int, Largest>{}, i);
  if constexpr (Largest > 4)
    for (; i + 4 <= rows; i += 4) body(std::integral_constant<int, 4>{}, i);
  for (; i < rows; ++i) body(std::integral_constant<int, 1>{}, i);
}

}  // namespace lorafast
