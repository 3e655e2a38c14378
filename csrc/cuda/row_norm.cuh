// row_norm: the sums of squares of the rows, or of the columns, of W + BA, reading W once.
//
// A step of the loop is 32 rows and 32 columns, which lie in a warp's lanes like those of
// low_rank_add: eight neighbours of each of four rows. W is what the sums of the tensor cores start
// from. A block has 32 rows (or columns), along which its warps take steps in turn; their factor
// stays in registers. W of the next step is on its way while one is multiplied.
#pragma once
#include "mma.cuh"

namespace lorafast {

// BLOCKS of sixteen ranks are multiplied at once; with MANY, several times. ACROSS: A is read as it
// is, [R,K].
template <class T, int WARPS, int BLOCKS, bool MANY, bool BY_ROW, bool ALIGNED, bool ACROSS>
struct RowNorm {
  // Beside a 16-bit W the factors are multiplied in tf32: its own rounding is coarser.
  static constexpr bool EXACT = sizeof(T) == 4 && EXACT_FP32;
  const T* W;
  int64 W_down, W_right;
  // [N,·] and [K,·] fp32, rounded to tf32 unless EXACT, rows 16 bytes aligned, zeros up to a
  // multiple of 32 rows and of 16·BLOCKS ranks. Unless MANY, that of the side which stays has R
  // ranks, lies in any way, and is multiplied by s and rounded here. ACROSS: A is fp32 [R,K], R a
  // multiple of four, rows 16 bytes aligned, and rounded here.
  const float *B, *A;
  int64 B_down, A_down, fixed_right;
  int N, K, R, passes;
  float s;

  RowFragment<float> rows[2][BLOCKS];
  ColumnFragment<float> columns[4][BLOCKS];
  float squares[BY_ROW ? 4 : 8] = {};
  // Moved on from step to step, like those of project.
  const char* W_at;
  int64 W_offset[4];
  const float *B_at[4], *A_at[4];

  // Of eight neighbours of a row: the tile of columns that number n is in, and which of the lane's
  // two columns there it is. ACROSS: columns 4g to 4g+3 are one of each tile.
  static DEVICE int tile_of(int n) { return ACROSS ? n % 4 : n / 2; }
  static DEVICE int place_in_tile(int n) { return ACROSS ? n / 4 : n % 2; }

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
      B_at[i] = pinned(B + own * B_down);
      if constexpr (ACROSS) {
        const int64 rank = least(4 * c, R - 4) + i;
        A_at[i] = pinned(A + rank * A_down + least(column + 4 * g, K - 4));
      } else {
        const int across = column + g / 2 * 8 + 2 * i + g % 2, last = BY_ROW ? across : K - 1;
        A_at[i] = pinned(A + least(across, last) * A_down);
      }
    }
  }

  DEVICE void load(Eight<T> (&to)[4], int inside) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const T* from = reinterpret_cast<const T*>(W_at + W_offset[i]);
      load_eight<ALIGNED, true>(to[i], from, W_right, inside);
    }
    W_at += 32 * WARPS * (BY_ROW ? (ALIGNED ? 1 : W_right) : W_down) * sizeof(T);
  }

  // Four ranks of a row of a factor, of which the side STAYS or moves.
  template <bool STAYS>
  DEVICE void load_ranks(Neighbours<float, 4>& to, const float* from, int first_rank) const {
    if constexpr (STAYS && !MANY) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int rank = first_rank + 4 * (threadIdx.x & 3) + i;
        const float value = rank < R ? s * __ldg(from + rank * fixed_right) : 0.0f;
        to.word[i] = __float_as_uint(EXACT ? value : rounded_to_tf32(value));
      }
    } else {
      load_wide<false>(to, from + first_rank + 4 * (threadIdx.x & 3));
    }
  }

  DEVICE void load_rows(int first_rank) {
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) {
      Neighbours<float, 4> one[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) load_ranks<BY_ROW>(one[i], B_at[i], first_rank + 16 * b);
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
        load_ranks<!BY_ROW>(one, A_at[j], first_rank + 16 * b);
        columns[j][b] = column_fragment(one, 0);
      }
    }
  }

  // The columns of the step, of four ranks and four columns that a lane loads.
  DEVICE void load_across() {
    const int c = threadIdx.x & 3;
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) {
      const int rank = 16 * b + 4 * c;
      const int64 further = b ? (least(rank, R - 4) - least(4 * c, R - 4)) * A_down : 0;
      Neighbours<float, 4> four[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) load_wide<false>(four[i], A_at[i] + further);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float value[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float one = EXACT ? four[i][j] : rounded_to_tf32(four[i][j]);
          value[i] = rank < R ? one : 0.0f;
        }
        columns[j][b] = rounded_column<float>(value);
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
  DEVICE void add(const Eight<T> (&w)[4], int height, bool inside) {
    float sum[2][4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int n = 0; n < 8; ++n) sum[i / 2][tile_of(n)][i % 2 * 2 + place_in_tile(n)] = w[i][n];
    }
    if constexpr (MANY) {
#pragma unroll 1
      for (int pass = 0; pass < passes; ++pass) {
        load_rows(16 * BLOCKS * pass);
        load_columns(16 * BLOCKS * pass);
        multiply_ranks(sum);
      }
    } else {
      if (ACROSS) load_across();
      if (BY_ROW && !ACROSS) load_columns(0);
      if (!BY_ROW) load_rows(0);
      multiply_ranks(sum);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (BY_ROW) A_at[i] += 32 * WARPS * (ACROSS ? 1 : A_down);
      if (!BY_ROW) B_at[i] += 32 * WARPS * B_down;
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const float v = sum[i / 2][tile_of(n)][i % 2 * 2 + place_in_tile(n)];
        const float counted = 8 * i < height && inside ? v : 0.0f;
        squares[BY_ROW ? i : n] += counted * counted;
      }
    }
  }

  // Add a block's steps from `first` on, of which the warp takes every WARPS-th: 32
  // columns each (BY_ROW) of the rows from `own` on, or 32 rows of the columns from `own` on.
  DEVICE void run(int own, int first, int steps) {
    const int c = threadIdx.x & 3, g = (threadIdx.x & 31) >> 2;
    const int whole = BY_ROW ? K : N, end = least(first + steps, whole / 32);
    const int inside = BY_ROW ? 8 : K - own - 8 * c;
    int step = first + (threadIdx.x >> 5);
    start(BY_ROW ? own : 32 * step, BY_ROW ? 32 * step : own);
    if (!MANY && BY_ROW) load_rows(0);
    if (!MANY && !BY_ROW) load_columns(0);
    Eight<T> even[4], odd[4];
    if (step < end) load(even, inside);
#pragma unroll 1
    while (step < end) {
      step += WARPS;
      if (step < end) load(odd, inside);
      add(even, 32, true);
      if (step >= end) break;
      step += WARPS;
      if (step < end) load(even, inside);
      add(odd, 32, true);
    }
    // The last step, if it is not whole.
    if (whole % 32 == 0 || step != whole / 32 || step >= first + steps) return;
    start(BY_ROW ? own : 32 * step, BY_ROW ? 32 * step : own);
    const int remaining = BY_ROW ? K - 32 * step - 8 * c : inside;
    load(even, remaining);
    add(even, BY_ROW ? 32 : N - 32 * step - g, BY_ROW ? remaining > 0 : true);
  }

  // out [N] or [K] receives the sums of all warps, added in order, or their roots. buffer: WARPS·32
  // numbers of shared memory.
  DEVICE void store(float* out, int own, bool root, float* buffer) {
    const int g = (threadIdx.x & 31) >> 2, c = threadIdx.x & 3, warp = threadIdx.x >> 5;
#pragma unroll
    for (int i = 0; i < (BY_ROW ? 4 : 8); ++i) {
#pragma unroll
      for (int apart = BY_ROW ? 1 : 4; apart < (BY_ROW ? 4 : 32); apart *= 2)
        squares[i] += __shfl_xor_sync(0xFFFFFFFFu, squares[i], apart);
      if ((BY_ROW ? c : g) == 0) buffer[32 * warp + (BY_ROW ? g + 8 * i : 8 * c + i)] = squares[i];
    }
    __syncthreads();
    if (warp || own + int(threadIdx.x) >= (BY_ROW ? N : K)) return;
    float sum = 0;
#pragma unroll
    for (int i = 0; i < WARPS; ++i) sum += buffer[32 * i + threadIdx.x];
    out[own + threadIdx.x] = root ? __fsqrt_rn(sum) : sum;
  }
};

}  // namespace lorafast
