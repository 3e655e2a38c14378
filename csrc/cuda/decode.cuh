// decode: y = gain⊙(x Wᵀ + h' (s·row_scale⊙B)ᵀ) + bias of at most sixteen tokens, reading W once.
//
// The product is project's loop with W in the place of x: a warp takes 32 rows of W, and the tokens
// are what ranks are there. The many warps of a block keep enough of W on its way where there is
// one block for each multiprocessor. Before the loop warp w adds ranks 16w to 16w+15 to its sum.
#pragma once
#include "project.cuh"

namespace lorafast {

constexpr int DECODE_WARPS = 16, DECODE_GROUPS = 2;

// The low-rank summand. h [M,R] of any strides; B [N,R] and row_scale [N] in dtypes of their own,
// row_scale may be null. s·row_scale⊙B is rounded once to T, as a copy by scale would be.
template <class T>
struct LowRank {
  const T* h;
  const void *B, *row_scale;
  int64 h_down, h_right, B_down, B_right;
  int R, B_dtype, row_scale_dtype;
  float s;

  // Adds sixteen ranks from first_rank on to the sums of rows row0 + 8i of N and the lane's tokens.
  template <int TILES, int GROUPS>
  DEVICE void add(float (&sum)[GROUPS][TILES][4], int first_rank, int64 row0, int64 N,
                  int64 M) const {
    constexpr int ROWS = 2 * GROUPS;
    const int g = (threadIdx.x & 31) >> 2, rank = first_rank + 4 * (threadIdx.x & 3);
    int64 at[4 * ROWS], row[ROWS];
    float B_own[4 * ROWS], factor[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      row[i] = least(row0 + 8 * i, N - 1);
      factor[i] = 1;
#pragma unroll
      for (int n = 0; n < 4; ++n)
        at[4 * i + n] = row[i] * B_down + least(rank + n, R - 1) * B_right;
    }
    numbers_at(B_own, B, B_dtype, at);
    if (row_scale) numbers_at(factor, row_scale, row_scale_dtype, row);
    Neighbours<T, 4> rows[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      float value[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) value[n] = rank + n < R ? s * factor[i] * B_own[4 * i + n] : 0;
      rows[i] = rounded_neighbours<T>(value);
    }
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
      Neighbours<T, 4> token;
      load_apart(token, h + least<int64>(8 * t + g, M - 1) * h_down + rank * h_right, h_right,
                 R - rank);
      const ColumnFragment<T> tokens = column_fragment(token, 0);
#pragma unroll
      for (int i = 0; i < GROUPS; ++i)
        multiply(sum[i][t], row_fragment(rows[2 * i], rows[2 * i + 1], 0), tokens);
    }
  }
};

// Stores a sum: inner receives it, and y what gain and bias make of it. inner may be null.
template <class T>
DEVICE void store_output(T* y, T* inner, int64 at, float sum, float gain, float bias) {
  if (inner) inner[at] = rounded<T>(sum);
  y[at] = rounded<T>(sum * gain + bias);
}

}  // namespace lorafast
