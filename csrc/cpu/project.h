// project: h = drop(x) Fᵀ, a sum along each row. grad_output computes u with the same tile.
#pragma once

#include "pack.h"
#include "stage.h"
#include "tile.h"
#include "workspace.h"

namespace lorafast {

// The numbers of a row that one tile sums. The part of the factor that belongs to them stays in the
// L1 cache for the next rows.
template <class T>
constexpr int64_t PROJECT_COLUMNS = 256 * per_cell<T>;
// The rows of the next tile that are prefetched during one group of ranks.
constexpr int PREFETCHED_ROWS = 2;
// The rows of one task.
constexpr int64_t PROJECT_TASK_ROWS = 4 * PROJECT_ROWS;

// sums[i][r] += Σ over columns k0 .. k0+n of rows m0 .. m0+rows. packed: F by pack_for_project.
// bits: the keep bits of these rows and columns, or null.
template <class T>
inline void project_tile(const Matrix<const T>& x, int64_t m0, int64_t rows, int64_t k0, int64_t n,
                         const uint8_t* bits, int64_t bits_row, const float* packed, int64_t ranks,
                         float* sums) {
  const int64_t full = n / SPAN<T> * SPAN<T>,
                stream = ceil_div(x.columns, SPAN<T>) * PROJECT_RANKS * W;
  packed += k0 / SPAN<T> * PROJECT_RANKS * W;
  for_row_tiles<PROJECT_ROWS>(rows, [&](auto rows_of, int64_t i) {
    constexpr int I = decltype(rows_of)::value;
    const T* a = x.row(m0 + i) + k0;
    const auto* masks = bits ? bits + i * bits_row : nullptr;
    const float* b = packed;
    for (int64_t r = 0; r < ranks; r += PROJECT_RANKS, b += stream) {
      Vector tile[I][PROJECT_RANKS];
      clear(tile);
      // Each group of ranks prefetches a few rows of the next tile.
      const T* next = a + (I + r / PROJECT_RANKS * PREFETCHED_ROWS % I) * x.stride;
      if (bits)
        multiply_lanes<T, Read::masked, PREFETCHED_ROWS>(a, x.stride, full, next, masks, bits_row,
                                                         b, tile);
      else
        multiply_lanes<T, Read::full, PREFETCHED_ROWS>(a, x.stride, full, next, nullptr, 0, b,
                                                       tile);
      if (full < n)
        multiply_lanes<T, Read::partial, 0>(a + full, x.stride, n - full, nullptr,
                                            masks ? masks + full / 8 : nullptr, bits_row,
                                            b + full / SPAN<T> * PROJECT_RANKS * W, tile);
      for (int ii = 0; ii < I; ++ii)
        add_lane_sums(tile[ii][0], tile[ii][1], tile[ii][2], tile[ii][3],
                      sums + (i + ii) * ranks + r);
    }
  });
}

// h = drop.scale·(mask⊙x) Fᵀ, rounded once. x [M,K], F [R,K] rounded to T, h [M,R].
template <class T>
void project(const Matrix<const T>& x, const Factor& F, const Dropout& drop, const Matrix<T>& h,
             int threads) {
  const int64_t ranks = round_up(F.R, PROJECT_RANKS), K = x.columns, step = PROJECT_COLUMNS<T>,
                bits_row = step / 8;
  const Vector scale = broadcast(drop.scale);
  const Workspace work(project_pack_size<T>(K, F.R));
  parallel(threads, [&] {
    pack_for_project<T>(F, {}, work);
    parallel_for(ceil_div(x.rows, PROJECT_TASK_ROWS), [&](int64_t task) {
      const int64_t m0 = task * PROJECT_TASK_ROWS, rows = min(PROJECT_TASK_ROWS, x.rows - m0);
      alignas(64) float sums[PROJECT_TASK_ROWS * MAX_RANK + W];
      alignas(64) uint8_t bits[PROJECT_TASK_ROWS * PROJECT_COLUMNS<T> / 8 + PHILOX_SLACK];
      std::memset(sums, 0, sizeof(float) * rows * ranks);
      for (int64_t k0 = 0; k0 < K; k0 += step) {
        const int64_t n = min(step, K - k0);
        if (drop) keep_tile(drop, K, m0, rows, k0, n, bits, bits_row);
        project_tile(x, m0, rows, k0, n, drop ? bits : nullptr, bits_row, work, ranks, sums);
      }
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t r = 0; r < F.R; r += W)
          store_partial(h.row(m0 + i) + r, mul(load(sums + i * ranks + r), scale), F.R - r);
    });
  });
}

}  // namespace lorafast
