// row_norm: the sums of squares of the rows, or of the columns, of W + BA, reading W once.
//
// A step of a warp's loop is 32 rows and 32 columns, which lie in its lanes like those of
// low_rank_add: eight neighbours of each of four rows. W is what the sums of the tensor cores start
// from. The factor of the side that the loop does not move along stays in registers. W of the next
// step is on its way while one is multiplied.
#pragma once
#include "mma.cuh"

namespace lorafast {

constexpr int ROW_NORM_WARPS = 4;

// BLOCKS of sixteen ranks are multiplied at once; with MANY, several times.
template <class T, int BLOCKS, bool MANY, bool BY_ROW, bool ALIGNED>
struct RowNorm {
  // Beside a 16-bit W the factors are multiplied in tf32: its own rounding is coarser.
  static constexpr bool EXACT = sizeof(T) == 4 && EXACT_FP32;
  const T* W;
  int64 W_down, W_right;
  // [N,·] and [K,·] fp32, rounded to tf32 unless EXACT, rows 16 bytes aligned, zeros up to a
  // multiple of 32 rows and of 16·BLOCKS ranks.
  const float *B, *A;
  int64 B_down, A_down;
  int N, K, passes;

  RowFragment<float> rows[2][BLOCKS];
  ColumnFragment<float> columns[4][BLOCKS];
  float squares[BY_ROW ? 4 : 8] = {};
  // Moved on from step to step, like those of project.
  const char* W_at;
  int64 W_offset[4];
  const float *B_at[4], *A_at[4];

  DEVICE void start(int row, int column) {
    const int g = (threadIdx.x & 31) >> 2, c = threadIdx.x & 3;
    W_at = reinterpret_cast<const char*>(W);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // Rows and columns beyond the last are the last ones again: what belongs to them is not
      // stored, or not counted. Columns beyond K of a lane with columns within are zeros.
      const int own = least(row + g + 8 * i, N - 1);
      const int beside = ALIGNED ? least(column + 8 * c, K - 8) : column + 8 * c;
      W_offset[i] = pinned(int64((own * W_down + beside * W_right) * sizeof(T)));
      B_at[i] = pinned(B + own * B_down + 4 * c);
      const int across = column + g / 2 * 8 + 2 * i + g % 2, last = BY_ROW ? across : K - 1;
      A_at[i] = pinned(A + least(across, last) * A_down + 4 * c);
    }
  }

  DEVICE void load(Eight<T> (&to)[4], int inside) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const T* from = reinterpret_cast<const T*>(W_at + W_offset[i]);
      load_eight<ALIGNED, true>(to[i], from, W_right, inside);
    }
    W_at += (BY_ROW ? (ALIGNED ? 32 : 32 * W_right) : 32 * W_down) * sizeof(T);
  }

  DEVICE void load_rows(int first_rank) {
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) {
      Neighbours<float, 4> one[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) load_wide<false>(one[i], B_at[i] + first_rank + 16 * b);
#pragma unroll
      for (int i = 0; i < 2; ++i) rows[i][b] = row_fragment(one[2 * i], one[2 * i + 1], 0);
    }
  }

  DEVICE void load_columns(int first_rank) {
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        Neighbours<float, 4> one;
        load_wide<false>(one, A_at[j] + first_rank + 16 * b);
        columns[j][b] = column_fragment(one, 0);
      }
    }
  }

  DEVICE void multiply_ranks(float (&sum)[2][4][4]) {
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) {
#pragma unroll
      for (int i = 0; i < 8; ++i)
        multiply<EXACT>(sum[i / 4][i % 4], rows[i / 4][b], columns[i % 4][b]);
    }
  }

  // height: the lane's rows within W begin below it. inside: whether its columns begin within W.
  DEVICE void step(const Eight<T> (&w)[4], int height, bool inside) {
    float sum[2][4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int n = 0; n < 8; ++n) sum[i / 2][n / 2][i % 2 * 2 + n % 2] = w[i][n];
    }
    if constexpr (MANY) {
#pragma unroll 1
      for (int pass = 0; pass < passes; ++pass) {
        load_rows(16 * BLOCKS * pass);
        load_columns(16 * BLOCKS * pass);
        multiply_ranks(sum);
      }
    } else {
      if (BY_ROW) load_columns(0);
      if (!BY_ROW) load_rows(0);
      multiply_ranks(sum);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (BY_ROW) A_at[i] += 32 * A_down;
      if (!BY_ROW) B_at[i] += 32 * B_down;
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const float v = sum[i / 2][n / 2][i % 2 * 2 + n % 2];
        const float counted = 8 * i < height && inside ? v : 0.0f;
        squares[BY_ROW ? i : n] += counted * counted;
      }
    }
  }

  // Add `steps` times 32 columns (BY_ROW) of the rows from `row` on, or 32 rows of the columns from
  // `column` on.
  DEVICE void run(int row, int column, int steps) {
    const int c = threadIdx.x & 3, g = (threadIdx.x & 31) >> 2;
    const int from = BY_ROW ? column : row, whole = BY_ROW ? K : N;
    const int inside = K - column - 8 * c;
    int left = least(steps, (whole - from) / 32);
    start(row, column);
    if (!MANY && BY_ROW) load_rows(0);
    if (!MANY && !BY_ROW) load_columns(0);
    Eight<T> even[4], odd[4];
    const bool ragged = whole % 32 && left < steps && from + 32 * left < whole;
    const int last = from + 32 * left;
    if (left > 0) load(even, BY_ROW ? 8 : inside);
#pragma unroll 1
    while (left > 0) {
      if (--left > 0) load(odd, BY_ROW ? 8 : inside);
      step(even, 32, true);
      if (left <= 0) break;
      if (--left > 0) load(even, BY_ROW ? 8 : inside);
      step(odd, 32, true);
    }
    if (!ragged) return;
    start(BY_ROW ? row : last, BY_ROW ? last : column);
    const int remaining = BY_ROW ? K - last - 8 * c : inside;
    load(even, remaining);
    step(even, BY_ROW ? 32 : N - last - g, BY_ROW ? remaining > 0 : true);
  }

  // out [N] or [K] receives the sums.
  DEVICE void store(float* out, int row, int column) {
    const int g = (threadIdx.x & 31) >> 2, c = threadIdx.x & 3;
#pragma unroll
    for (int i = 0; i < (BY_ROW ? 4 : 8); ++i) {
#pragma unroll
      for (int apart = BY_ROW ? 1 : 4; apart < (BY_ROW ? 4 : 32); apart *= 2)
        squares[i] += __shfl_xor_sync(0xFFFFFFFFu, squares[i], apart);
      const int at = BY_ROW ? row + g + 8 * i : column + 8 * c + i;
      if ((BY_ROW ? c : g) == 0 && at < (BY_ROW ? N : K)) out[at] = squares[i];
    }
  }
};

}  // namespace lorafast
