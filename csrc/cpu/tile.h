// The one inner loop of all products: a small tile of sums, held in registers.
#pragma once

#include <type_traits>

#include "vector.h"

namespace lorafast {

// sums[i][j] += Σ_p a[i,p] b[p,jW:(j+1)W] over `length` steps, each cell of a on every lane. Rows and steps of a are a_row and
// a_step cells apart, steps of b b_step cells.
template <bool pairs, int I, int J>
inline __attribute__((always_inline)) void multiply(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_step,
                                                    int64_t length, Vector (&sums)[I][J]) {
  for (int64_t p = 0; p < length; ++p, a += a_step, b += b_step) {
    Vector row[J];
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) row[j] = load(b + j * W);
#pragma GCC unroll 12
    for (int i = 0; i < I; ++i) {
      const Vector each = splat(a[i * a_row]);
#pragma GCC unroll 4
      for (int j = 0; j < J; ++j) sums[i][j] = mac<pairs>(sums[i][j], each, row[j]);
    }
  }
}

// sums[i][j] += Σ over spans of a's row i times b's rank j, lane by lane. a: n numbers of each row, a_row numbers apart; bits:
// theirs, bits_row bytes apart, or null; b: J ranks of W cells a span. ahead: how many of the rows from `next` on are fetched
// meanwhile.
template <class T, Read how, int ahead, int I, int J>
inline __attribute__((always_inline)) void multiply_long(const T* a, int64_t a_row, int64_t n, const T* next, const uint8_t* bits,
                                                         int64_t bits_row, const float* b, Vector (&sums)[I][J]) {
  for (int64_t k = 0; k < n; k += W * per_cell<T>, b += J * W) {
    Vector rank[J];
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) rank[j] = load(b + j * W);
#pragma GCC unroll 12
    for (int i = 0; i < I; ++i) {
      if (i < ahead && k * sizeof(T) % 64 == 0) __builtin_prefetch(next + i * a_row + k);
      const Vector row = load_cells<T, how>(a + i * a_row + k, n - k, bits ? bits + i * bits_row + k / 8 : nullptr);
#pragma GCC unroll 4
      for (int j = 0; j < J; ++j) sums[i][j] = mac<paired<T>>(sums[i][j], row, rank[j]);
    }
  }
}

template <int I, int J>
inline __attribute__((always_inline)) void clear(Vector (&sums)[I][J]) {
#pragma GCC unroll 12
  for (int i = 0; i < I; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) sums[i][j] = zero();
}

// Calls body(I, first) so that rows of every count are covered by tiles of I = Most, 4 and 1 rows.
template <int Most, class Body>
inline void by_rows(int64_t rows, Body&& body) {
  int64_t i = 0;
  for (; i + Most <= rows; i += Most) body(std::integral_constant<int, Most>{}, i);
  if constexpr (Most > 4)
    for (; i + 4 <= rows; i += 4) body(std::integral_constant<int, 4>{}, i);
  for (; i < rows; ++i) body(std::integral_constant<int, 1>{}, i);
}

}  // namespace lorafast
