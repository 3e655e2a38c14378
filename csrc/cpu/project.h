// h = drop(x) Fᵀ: a long sum along each row. project's h and grad_output's u.
#pragma once

#include "pack.h"
#include "stage.h"
#include "tile.h"
#include "workspace.h"

namespace lorafast {

// Numbers of a row that one tile sums: so many that what it reads of the factor stays in the nearest cache for the next rows.
template <class T>
constexpr int64_t DOWN_COLUMNS = 256 * per_cell<T>;
// Rows of the next tile that are fetched while one group of ranks goes by.
constexpr int AHEAD = 2;
// Rows a task takes.
constexpr int64_t DOWN_TASK = 4 * DOWN_ROWS;

// totals[i][r] += Σ over columns k0 .. k0+n of rows m0 .. m0+rows. packed: F as pack_long lays it; bits: theirs, or null.
template <class T>
inline void down_tile(const Matrix<const T>& x, int64_t m0, int64_t rows, int64_t k0, int64_t n, const uint8_t* bits,
                      int64_t bits_row, const float* packed, int64_t ranks, float* totals) {
  const int64_t whole = n / SPAN<T> * SPAN<T>, stream = ceil_div(x.columns, SPAN<T>) * DOWN_RANKS * W;
  packed += k0 / SPAN<T> * DOWN_RANKS * W;
  by_rows<DOWN_ROWS>(rows, [&](auto rows_of, int64_t i) {
    constexpr int I = decltype(rows_of)::value;
    const T* a = x.row(m0 + i) + k0;
    const auto* masks = bits ? bits + i * bits_row : nullptr;
    const float* b = packed;
    for (int64_t r = 0; r < ranks; r += DOWN_RANKS, b += stream) {
      Vector sums[I][DOWN_RANKS];
      clear(sums);
      // The ranks fetch the next tile's rows among them, a few each.
      const T* next = a + (I + r / DOWN_RANKS * AHEAD % I) * x.stride;
      if (bits)
        multiply_long<T, Read::masked, AHEAD>(a, x.stride, whole, next, masks, bits_row, b, sums);
      else
        multiply_long<T, Read::whole, AHEAD>(a, x.stride, whole, next, nullptr, 0, b, sums);
      if (whole < n)
        multiply_long<T, Read::ending, 0>(a + whole, x.stride, n - whole, nullptr, masks ? masks + whole / 8 : nullptr, bits_row,
                                          b + whole / SPAN<T> * DOWN_RANKS * W, sums);
      for (int ii = 0; ii < I; ++ii) add_totals(sums[ii][0], sums[ii][1], sums[ii][2], sums[ii][3], totals + (i + ii) * ranks + r);
    }
  });
}

// h = drop.scale·(drop(x) Fᵀ), rounded once. x [M,K], F [R,K] rounded to T, h [M,R].
template <class T>
void project(const Matrix<const T>& x, const Factor& F, const Dropout& drop, const Matrix<T>& h, int threads) {
  const int64_t ranks = round_up(F.R, DOWN_RANKS), K = x.columns, step = DOWN_COLUMNS<T>, bits_row = step / 8;
  const Vector scale = splat(drop.scale);
  const Workspace work(packed_long<T>(K, F.R));
  team(threads, [&] {
    pack_long<T>(F, {}, work);
    each(ceil_div(x.rows, DOWN_TASK), [&](int64_t task) {
      const int64_t m0 = task * DOWN_TASK, rows = at_most(DOWN_TASK, x.rows - m0);
      alignas(64) float totals[DOWN_TASK * MAX_RANK + W];
      alignas(64) uint8_t bits[DOWN_TASK * DOWN_COLUMNS<T> / 8 + PHILOX_SLACK];
      std::memset(totals, 0, sizeof(float) * rows * ranks);
      for (int64_t k0 = 0; k0 < K; k0 += step) {
        const int64_t n = at_most(step, K - k0);
        if (drop) keep_tile(drop, K, m0, rows, k0, n, bits, bits_row);
        down_tile(x, m0, rows, k0, n, drop ? bits : nullptr, bits_row, work, ranks, totals);
      }
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t r = 0; r < F.R; r += W) store_some(h.row(m0 + i) + r, mul(load(totals + i * ranks + r), scale), F.R - r);
    });
  });
}

}  // namespace lorafast
