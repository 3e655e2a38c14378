// low_rank_add: y = gain⊙(y + h' Fᵀ) + bias, and dx = (dx if it is added to) + mask⊙(v Fᵀ).
//
// A warp computes 32 rows, and in a step of its loop 32 columns. The tensor cores leave two
// neighbours of each of four tiles of columns in a lane; which columns a tile has is free, so that
// these are eight neighbours of a row: one load, one call of Philox, one store. What is added to in
// the next step is on its way meanwhile. The factors of the rows stay in registers.
#pragma once
#include "mma.cuh"
#include "philox.cuh"

namespace lorafast {

constexpr int LOW_RANK_ADD_WARPS = 4;
// The blocks that a multiprocessor holds at least, with gains and up to sixteen ranks: from sm_100
// on the compiler takes more registers.
#if __CUDA_ARCH__ >= 1000
constexpr int GAINED_BLOCKS = 2;
#else
constexpr int GAINED_BLOCKS = 3;
#endif
// Steps of a block whose gains lie in shared memory at once.
constexpr int GAINED_STEPS = 64;

// What becomes of the product. gains: of shared memory, of the columns from `first` on. bias: fp32,
// 16 bytes aligned, null if there is none.
struct Epilogue {
  float* gains;
  const float* bias;
  int first;

  // Before a run over up to GAINED_STEPS from column `from` on.
  DEVICE void load_gains(const Gain& gain, int from, int N) {
    first = from;
    __syncthreads();
    // Of whole steps: beyond N the last one again.
    for (int n = threadIdx.x; n < 32 * GAINED_STEPS && from + n < (N + 31) / 32 * 32;
         n += blockDim.x)
      gains[n] = gain.at(least(from + n, N - 1));
    __syncthreads();
  }
};

// BLOCKS of sixteen ranks are multiplied at once; with MANY, several times.
template <class T, int BLOCKS, bool MANY, bool DROPS, bool ADDS, bool GAINS, bool KEEPS,
          bool ALIGNED, bool RAW, bool ACROSS>
struct LowRankAdd {
  const T* h;  // [M,R] dense rows, R a multiple of four, rows aligned to four numbers
  // [N,·] of T, rows 16 bytes aligned, zeros up to multiples of 32 rows and 16·BLOCKS ranks. RAW:
  // fp32 [N,R], multiplied by s here; with ACROSS [R,N]; rows 16 bytes aligned.
  const void* F;
  T *out, *inner;
  int64 h_down, F_down, M;
  int N, R, passes;
  float s, scale;
  Epilogue epilogue;

  int64 first_row;
  // Moved on from step to step, like those of project. place: of the first step's numbers in out.
  const T* F_at;
  T *out_at, *out_ahead, *inner_at;
  int64 place[4];
  uint64 counter[4];
  RowFragment<T> rows[2][BLOCKS];
  float sum[2][4][4];

  DEVICE int64 row(int i) const { return first_row + 8 * i; }

  // Sixteen ranks of a lane are four neighbours.
  DEVICE void load_rows(int first_rank) {
    const int c = threadIdx.x & 3;
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) {
      const int rank = first_rank + 16 * b + 4 * c;
      Neighbours<T, 4> one[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        load_wide<false>(one[i], h + least(row(i), M - 1) * h_down + least(rank, R - 4));
#pragma unroll
        for (int n = 0; n < Neighbours<T, 4>::WORDS; ++n)
          one[i].word[n] = rank < R ? one[i].word[n] : 0;
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) rows[i][b] = row_fragment(one[2 * i], one[2 * i + 1], 0);
    }
  }

  // Column g of tile j among the 32 of a step. ACROSS: those of four tiles are neighbours, too.
  static DEVICE int column_of(int g, int j) {
    return ACROSS ? 4 * g + j : g / 2 * 8 + 2 * j + g % 2;
  }

  DEVICE void multiply_ranks(int first_rank) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const T* from = F_at + 2 * j * F_down + first_rank;
#pragma unroll
      for (int b = 0; b < BLOCKS; ++b) {
        Neighbours<T, 4> factor;
        load_wide<false>(factor, from + 16 * b);
#pragma unroll
        for (int i = 0; i < 2; ++i) multiply(sum[i][j], rows[i][b], column_fragment(factor, 0));
      }
    }
    if (!MANY) F_at += 32 * F_down;
  }

  DEVICE void multiply_raw(int column) {
    const int g = (threadIdx.x & 31) >> 2, c = threadIdx.x & 3;
    // N is a multiple of eight: columns beyond it are the last eight again, and are not stored.
    const int beyond = least(N - 8 - column - g / 2 * 8, 0),
              own = column + column_of(g, 0) + beyond;
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) {
      const int rank = 16 * b + 4 * c;
      Neighbours<float, 4> four[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64 first = least(rank, R - 4);
        const int64 at = ACROSS ? (first + i) * F_down + own : (own + 2 * i) * F_down + first;
        load_wide<false>(four[i], static_cast<const float*>(F) + at);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float value[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
          value[i] = rank < R ? s * (ACROSS ? four[i][j] : four[j][i]) : 0;
        const ColumnFragment<T> factor = rounded_column<T>(value);
#pragma unroll
        for (int i = 0; i < 2; ++i) multiply(sum[i][j], rows[i][b], factor);
      }
    }
  }

  // No branch stands in a step but around stores: the compiler computes keys anew behind each.
  DEVICE void load(Eight<T> (&before)[4], int column) {
    // Columns beyond N are the last ones again, and are not stored.
    const int own = column + 8 * (threadIdx.x & 3), beyond = ALIGNED ? own + 8 - N : 0;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      load_written<ALIGNED>(before[i], out_ahead + place[i] - (beyond > 0 ? beyond : 0), N - own);
    out_ahead += 32;
  }

  DEVICE void step(const Eight<T> (&before)[4], int column, const Dropout& dropout) {
#pragma unroll
    for (int i = 0; i < 32; ++i) sum[i / 16][i / 4 % 4][i % 4] = 0;
    if constexpr (MANY) {
#pragma unroll 1
      for (int pass = 0; pass < passes; ++pass) {
        load_rows(16 * BLOCKS * pass);
        multiply_ranks(16 * BLOCKS * pass);
      }
      F_at += 32 * F_down;
    } else if constexpr (RAW) {
      multiply_raw(column);
    } else {
      multiply_ranks(0);
    }
    const int own = column + 8 * (threadIdx.x & 3);
    float gain[8], bias[8];
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      gain[n] = 1;
      bias[n] = 0;
    }
    if (GAINS) {
#pragma unroll
      for (int n = 0; n < 8; ++n) gain[n] = epilogue.gains[own - epilogue.first + n];
    }
    if (GAINS && epilogue.bias) load_numbers(bias, epilogue.bias, own);
#pragma unroll
    for (int i = 0; i < 4; ++i) finish_row(i, own, before[i], gain, bias, dropout);
    out_at += 32;
    inner_at += 32;
  }

  DEVICE void finish_row(int i, int own, const Eight<T>& before, const float (&gain)[8],
                         const float (&bias)[8], const Dropout& dropout) {
    uint32 word[4];
    if (DROPS) dropout.words(word, counter[i]);
    counter[i] += 4;
    float value[8];
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      // Of column_of.
      const int j = ACROSS ? n % 4 : n / 2, beside = ACROSS ? n / 4 : n % 2;
      const float product = sum[i / 2][j][i % 2 * 2 + beside];
      const float start = ADDS ? before[n] : 0.0f;
      const float total = start + product * scale;
      value[n] = !DROPS || dropout.keeps(word, n) ? total : start;
    }
    const int inside = row(i) < M ? N - own : 0;
    if (KEEPS) store_eight<ALIGNED>(inner_at + place[i], rounded_eight<T>(value), inside);
    if (GAINS) {
#pragma unroll
      for (int n = 0; n < 8; ++n) value[n] = value[n] * gain[n] + bias[n];
    }
    store_eight<ALIGNED>(out_at + place[i], rounded_eight<T>(value), inside);
  }

  DEVICE void load_numbers(float (&to)[8], const float* from, int own) const {
    Eight<float> numbers;
    if (!ALIGNED || own < N) load_eight<ALIGNED, false>(numbers, from + own, 1, N - own);
#pragma unroll
    for (int n = 0; n < 8; ++n) to[n] = numbers[n];
  }

  DEVICE void run(int column, int steps, const Dropout& dropout) {
    const int g = (threadIdx.x & 31) >> 2, c = threadIdx.x & 3;
    const int end = least(column + 32 * steps, N);
    if (!MANY) load_rows(0);
    out_at = out_ahead = out;
    inner_at = inner;
    F_at = static_cast<const T*>(F) + (column + column_of(g, 0)) * F_down + 4 * c;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64 own = least(row(i), M - 1);
      place[i] = pinned(own * N + column + 8 * c);
      counter[i] = uint64(own * dropout.groups + (column + 8 * c) / 8);
    }
    Eight<T> even[4], odd[4];
    if (ADDS && column < end) load(even, column);
#pragma unroll 1
    while (column < end) {
      if (ADDS && column + 32 < end) load(odd, column + 32);
      step(even, column, dropout);
      column += 32;
      if (column >= end) break;
      if (ADDS && column + 32 < end) load(even, column + 32);
      step(odd, column, dropout);
      column += 32;
    }
  }
};

}  // namespace lorafast
