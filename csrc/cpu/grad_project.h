// grad_project: vᵀ drop(x), a sum over tokens. grad_output computes its sums over tokens with the
// same tile.
#pragma once

#include "pack.h"
#include "stage.h"
#include "tile.h"
#include "workspace.h"

namespace lorafast {

// A block of ROW_BLOCK rows is summed in registers, a few columns at a time, before the sum is
// added to memory.
constexpr int64_t ROW_BLOCK_CELLS = 64;
template <class T>
constexpr int64_t ROW_BLOCK = ROW_BLOCK_CELLS * per_cell<T>;
constexpr int64_t GRAD_PROJECT_COLUMNS = GRAD_PROJECT_VECTORS * W;
// The columns that are staged at once, and the least columns of a task. The keep bits of so many
// columns are drawn by whole calls of keep_bits.
constexpr int64_t STAGED_COLUMNS = 256;
// The cells from one block of staged columns to the next. It is not a power of two: the blocks
// would then compete for a few sets of the cache.
constexpr int64_t STAGED_BLOCK_STRIDE = ROW_BLOCK_CELLS * GRAD_PROJECT_COLUMNS + 2 * W;
// The most parts that the rows are split into, and the most tasks. Both depend on shapes alone,
// never on the number of threads, so that sums are always added in the same order.
constexpr int64_t MAX_SPLITS = 8, MAX_TASKS = 32;

// How M rows and N columns are divided into tasks: `splits` parts of `rows` rows times `groups`
// groups of `columns` columns.
struct Partition {
  int64_t rows, splits, columns, groups;

  Partition(int64_t M, int64_t N, int64_t least_columns) {
    rows = round_up(max(ceil_div(M, MAX_SPLITS), 1), 128);
    splits = ceil_div(M, rows);
    columns = round_up(max(ceil_div(N, ceil_div(MAX_TASKS, max(splits, 1))), 1), least_columns);
    groups = ceil_div(N, columns);
  }
};

// STAGED_COLUMNS columns of one row block, as cells.
struct StagedColumns {
  alignas(64) float cells[STAGED_COLUMNS / GRAD_PROJECT_COLUMNS * STAGED_BLOCK_STRIDE];

  // The block of column n, in a task whose columns start at `first`.
  float* block(int64_t n, int64_t first) {
    return cells + (n - first) % STAGED_COLUMNS / GRAD_PROJECT_COLUMNS * STAGED_BLOCK_STRIDE;
  }
};

// The offset of column n in sums of `rows` rows, laid out as
// [columns / GRAD_PROJECT_COLUMNS][rows][GRAD_PROJECT_COLUMNS] so that a tile adds to contiguous
// memory.
inline int64_t sums_offset(int64_t n, int64_t rows) {
  return n / GRAD_PROJECT_COLUMNS * GRAD_PROJECT_COLUMNS * rows + n % GRAD_PROJECT_COLUMNS;
}

// sums[r][0:columns] += Σ_p v[p][r] cells[p][0:columns] for r < R and p < steps. Shapes: v
// [steps][v_stride], cells [steps][GRAD_PROJECT_COLUMNS], sums [R][GRAD_PROJECT_COLUMNS].
template <class T>
inline void grad_project_tile(const float* v, int64_t v_stride, int64_t R, const float* cells,
                              int64_t steps, int64_t columns, float* sums) {
  int64_t n = 0;
  const auto add_columns = [&](auto vectors_of) {
    constexpr int J = decltype(vectors_of)::value;
    for_row_tiles<GRAD_PROJECT_ROWS>(R, [&](auto rows_of, int64_t r) {
      constexpr int I = decltype(rows_of)::value;
      Vector tile[I][J];
      clear(tile);
      multiply_broadcast<paired<T>>(v + r, 1, v_stride, cells + n, GRAD_PROJECT_COLUMNS, steps,
                                    tile);
#pragma GCC unroll 12
      for (int i = 0; i < I; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < J; ++j) {
          float* to = sums + (r + i) * GRAD_PROJECT_COLUMNS + n + j * W;
          store(to, add(load(to), tile[i][j]));
        }
    });
    n += J * W;
  };
  if (columns > W)
    add_columns(std::integral_constant<int, GRAD_PROJECT_VECTORS>{});
  else
    add_columns(std::integral_constant<int, 1>{});
}

// out = drop.scale·vᵀ (mask⊙x), in fp32. x [M,K], v [M,R], out [R,K].
template <class T>
void grad_project(const Matrix<const T>& x, const Matrix<const LowRankGrad<T>>& v,
                  const Dropout& drop, const Matrix<float>& out, int threads) {
  const int64_t R = v.columns, K = x.columns, Kp = round_up(K, STAGED_COLUMNS);
  const Partition partition(x.rows, K, STAGED_COLUMNS);
  const Vector scale = broadcast(drop.scale);
  const Workspace work(partition.splits * R * Kp);
  parallel(threads, [&] {
    parallel_for(partition.splits * partition.groups, [&](int64_t task) {
      const int64_t split = task / partition.groups,
                    m_end = min((split + 1) * partition.rows, x.rows);
      const int64_t first = task % partition.groups * partition.columns,
                    end = min(first + partition.columns, K);
      alignas(64) float v_cells[ROW_BLOCK<T> * MAX_RANK + 2 * W];
      alignas(64) uint8_t bits[ROW_BLOCK<T> * STAGED_COLUMNS / 8 + PHILOX_SLACK];
      StagedColumns x_cells;
      float* sums = work + split * R * Kp;
      std::memset(sums + first * R, 0,
                  sizeof(float) * (round_up(end, GRAD_PROJECT_COLUMNS) - first) * R);
      for (int64_t m = split * partition.rows; m < m_end; m += ROW_BLOCK<T>) {
        const int64_t rows = min(ROW_BLOCK<T>, m_end - m);
        stage_columns(v, m, rows, 0, R, nullptr, 0, v_cells, padded(R), 0);
        for (int64_t k = first; k < end; k += GRAD_PROJECT_COLUMNS) {
          if ((k - first) % STAGED_COLUMNS == 0) {
            const int64_t n = min(STAGED_COLUMNS, end - k);
            if (drop) keep_tile(drop, K, m, rows, k, n, bits, STAGED_COLUMNS / 8);
            stage_columns(x, m, rows, k, n, drop ? bits : nullptr, STAGED_COLUMNS / 8,
                          x_cells.cells, GRAD_PROJECT_COLUMNS, STAGED_BLOCK_STRIDE);
          }
          grad_project_tile<T>(v_cells, padded(R), R, x_cells.block(k, first), cells<T>(rows),
                               min(GRAD_PROJECT_COLUMNS, end - k), sums + sums_offset(k, R));
        }
      }
    });
    parallel_for(R * ceil_div(K, STAGED_COLUMNS), [&](int64_t task) {
      const int64_t r = task % R, first = task / R * STAGED_COLUMNS;
      for (int64_t k = first; k < min(first + STAGED_COLUMNS, K); k += W) {
        Vector sum = zero();
        for (int64_t split = 0; split < partition.splits; ++split)
          sum =
              add(sum, load(work + split * R * Kp + sums_offset(k, R) + r * GRAD_PROJECT_COLUMNS));
        store_partial(out.row(r) + k, mul(sum, scale), K - k);
      }
    });
  });
}

}  // namespace lorafast
