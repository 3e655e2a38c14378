// Σ over tokens: vᵀ drop(x), and with it what else is summed over the tokens of dy.
#pragma once

#include "pack.h"
#include "stage.h"
#include "tile.h"
#include "workspace.h"

namespace lorafast {

// A panel of rows is summed in registers, a few columns at a time, before it joins what is in memory.
constexpr int64_t PANEL_CELLS = 64;
template <class T>
constexpr int64_t PANEL = PANEL_CELLS * per_cell<T>;
constexpr int64_t OUTER_COLUMNS = OUTER_VECTORS * W;
// Columns a task takes at least, and columns that are staged at once, their bits drawn: whole calls of keep_bits.
constexpr int64_t GROUP = 256;
// Cells from one block of staged columns to the next: not a power of two, which would send them all to the same few places of the
// cache.
constexpr int64_t BLOCK = PANEL_CELLS * OUTER_COLUMNS + 2 * W;
// The most shares a sum over tokens is cut into, and tasks a matrix is cut into. Shapes alone decide, never threads.
constexpr int64_t MOST_SHARES = 8, MOST_TASKS = 32;

// How M rows and N columns are cut: `shares` of `rows` rows, `groups` of `columns` columns.
struct Cut {
  int64_t rows, shares, columns, groups;

  Cut(int64_t M, int64_t N, int64_t least_columns) {
    rows = round_up(at_least(ceil_div(M, MOST_SHARES), 1), 128);
    shares = ceil_div(M, rows);
    columns = round_up(at_least(ceil_div(N, ceil_div(MOST_TASKS, at_least(shares, 1))), 1), least_columns);
    groups = ceil_div(N, columns);
  }
};

// A group of columns, staged.
struct Staged {
  alignas(64) float cells[GROUP / OUTER_COLUMNS * BLOCK];

  // The block of column n of a task that began at column `first`.
  float* at(int64_t n, int64_t first) { return cells + (n - first) % GROUP / OUTER_COLUMNS * BLOCK; }
};

// Where the sums of column n lie among those of `rows` rows: [columns / OUTER_COLUMNS][rows][OUTER_COLUMNS], what a tile adds to
// being one piece.
inline int64_t sums_of(int64_t n, int64_t rows) { return n / OUTER_COLUMNS * OUTER_COLUMNS * rows + n % OUTER_COLUMNS; }

// sums[r][0:columns] += Σ_p v[p][r] cells[p][...] for r < R: v [P][v_stride], cells [P][OUTER_COLUMNS], sums [R][OUTER_COLUMNS].
template <class T>
inline void outer_tile(const float* v, int64_t v_stride, int64_t R, const float* cells, int64_t P, int64_t columns, float* sums) {
  int64_t n = 0;
  const auto block = [&](auto vectors_of) {
    constexpr int J = decltype(vectors_of)::value;
    by_rows<OUTER_ROWS>(R, [&](auto rows_of, int64_t r) {
      constexpr int I = decltype(rows_of)::value;
      Vector part[I][J];
      clear(part);
      multiply<paired<T>>(v + r, 1, v_stride, cells + n, OUTER_COLUMNS, P, part);
#pragma GCC unroll 12
      for (int i = 0; i < I; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < J; ++j) {
          float* to = sums + (r + i) * OUTER_COLUMNS + n + j * W;
          store(to, add(load(to), part[i][j]));
        }
    });
    n += J * W;
  };
  if (columns > W)
    block(std::integral_constant<int, OUTER_VECTORS>{});
  else
    block(std::integral_constant<int, 1>{});
}

// out = drop.scale·vᵀ drop(x), in fp32. x [M,K], v [M,R], out [R,K].
template <class T>
void grad_project(const Matrix<const T>& x, const Matrix<const T>& v, const Dropout& drop, const Matrix<float>& out, int threads) {
  const int64_t R = v.columns, K = x.columns, Kp = round_up(K, GROUP);
  const Cut cut(x.rows, K, GROUP);
  const Vector scale = splat(drop.scale);
  const Workspace work(cut.shares * R * Kp);
  team(threads, [&] {
    each(cut.shares * cut.groups, [&](int64_t task) {
      const int64_t share = task / cut.groups, m_end = at_most((share + 1) * cut.rows, x.rows);
      const int64_t first = task % cut.groups * cut.columns, end = at_most(first + cut.columns, K);
      alignas(64) float left[PANEL<T> * MAX_RANK + 2 * W];
      alignas(64) uint8_t bits[PANEL<T> * GROUP / 8 + PHILOX_SLACK];
      Staged right;
      float* sums = work + share * R * Kp;
      std::memset(sums + first * R, 0, sizeof(float) * (round_up(end, OUTER_COLUMNS) - first) * R);
      for (int64_t m = share * cut.rows; m < m_end; m += PANEL<T>) {
        const int64_t rows = at_most(PANEL<T>, m_end - m);
        stage_columns(v, m, rows, 0, R, nullptr, 0, left, padded(R), 0);
        for (int64_t k = first; k < end; k += OUTER_COLUMNS) {
          if ((k - first) % GROUP == 0) {
            const int64_t n = at_most(GROUP, end - k);
            if (drop) keep_tile(drop, K, m, rows, k, n, bits, GROUP / 8);
            stage_columns(x, m, rows, k, n, drop ? bits : nullptr, GROUP / 8, right.cells, OUTER_COLUMNS, BLOCK);
          }
          outer_tile<T>(left, padded(R), R, right.at(k, first), cells<T>(rows), at_most(OUTER_COLUMNS, end - k),
                        sums + sums_of(k, R));
        }
      }
    });
    each(R * ceil_div(K, GROUP), [&](int64_t task) {
      const int64_t r = task % R, first = task / R * GROUP;
      for (int64_t k = first; k < at_most(first + GROUP, K); k += W) {
        Vector sum = zero();
        for (int64_t share = 0; share < cut.shares; ++share)
          sum = add(sum, load(work + share * R * Kp + sums_of(k, R) + r * OUTER_COLUMNS));
        store_some(out.row(r) + k, mul(sum, scale), K - k);
      }
    });
  });
}

}  // namespace lorafast
