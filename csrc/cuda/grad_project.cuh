// grad_project: dA = vᵀ drop(x), reading x once.
//
// A warp computes 64 columns of dA. A step of the loop takes sixteen tokens: a lane loads eight
// neighbours of four of them, each of which is one call of Philox. The sum runs over tokens, and
// the tensor cores want two of them in a word: words of two rows are interleaved, in registers. The
// ranks that a lane holds are neighbours too. The warps of a block take steps in turn, and their
// sums are added at the end. x of the next step is on its way while one is multiplied.
#pragma once
#include "mma.cuh"
#include "philox.cuh"

namespace lorafast {

constexpr int GRAD_PROJECT_WARPS = 4;

// Column 8g+2j of four tokens, and column 8g+2j+1, as rows g and g+8.
template <class T>
DEVICE RowFragment<T> token_rows(const Eight<T> (&token)[4], int j) {
  RowFragment<T> to;
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      to.word[i] = side_by_side(token[i / 2 * 2].word[j], token[i / 2 * 2 + 1].word[j], i % 2);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) to.word[i] = token[i / 2].word[2 * j + i % 2];
  }
  return to;
}

// Number i of four tokens' neighbours.
template <class T, int COUNT>
DEVICE ColumnFragment<T> token_column(const Neighbours<T, COUNT> (&token)[4], int i) {
  ColumnFragment<T> to;
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int n = 0; n < 2; ++n)
      to.word[n] = side_by_side(token[2 * n].word[i / 2], token[2 * n + 1].word[i / 2], i % 2);
  } else {
#pragma unroll
    for (int n = 0; n < 4; ++n) to.word[n] = token[n].word[i];
  }
  return to;
}

// The factor whose sum over tokens is wanted: v [M,R], neighbours of a row at once. COUNT of them
// belong to a lane: rank COUNT·g + i of a block of 8·COUNT is column g of tile i.
template <class T, int TILES>
struct TokenFactor {
  static constexpr int COUNT = TILES < 8 ? TILES : 8, BLOCKS = TILES / COUNT;
  // One number is loaded with its neighbour, where there is one, or alone.
  static constexpr int WIDTH = COUNT * sizeof(T) < 4 ? 2 : COUNT;
  Neighbours<T, WIDTH> token[BLOCKS][4];

  DEVICE void load(const T* const (&at)[4], const int (&offset)[BLOCKS]) {
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (WIDTH != COUNT) {
          token[b][i].word[0] = pattern_at(at[i] + offset[b]);
        } else {
          load_wide<false>(token[b][i], at[i] + offset[b]);
        }
      }
    }
  }

  DEVICE ColumnFragment<T> column(int tile) const {
    return token_column(token[tile / COUNT], tile % COUNT);
  }

  // The rank of column n of a tile.
  static DEVICE int rank(int tile, int n) {
    return tile / COUNT * 8 * COUNT + COUNT * n + tile % COUNT;
  }
};

template <class T, int TILES, bool DROPS, bool ALIGNED>
struct GradProject {
  using Factor = TokenFactor<T, TILES>;
  const T *x, *v;
  int64 x_down, x_right, v_down, M;
  int K, R;

  float sum[4][TILES][4] = {};
  // Moved on from step to step, like those of project.
  const char* x_at;
  int64 x_offset[4];
  const T* v_at[4];
  uint64 counter[4];
  int offset[Factor::BLOCKS];

  DEVICE void start(int column, int first_rank, int64 token, int64 groups) {
#pragma unroll
    for (int b = 0; b < Factor::BLOCKS; ++b) {
      // Ranks beyond R are the last ones again, and are not stored.
      const int own = (threadIdx.x & 31) / 4 * Factor::COUNT;
      offset[b] = least(first_rank + b * 8 * Factor::COUNT + own, R - Factor::COUNT);
    }
    x_at = reinterpret_cast<const char*>(x);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64 row = least(token + i, M - 1);
      x_offset[i] = pinned(int64((row * x_down + column * x_right) * sizeof(T)));
      v_at[i] = v + row * v_down;
      counter[i] = uint64(row * groups + column / 8);
    }
  }

  DEVICE void load(Eight<T> (&to)[4], int inside) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const T* from = reinterpret_cast<const T*>(x_at + x_offset[i]);
      load_eight<ALIGNED, true>(to[i], from, x_right, inside);
    }
    x_at += 16 * GRAD_PROJECT_WARPS * sizeof(T) * x_down;
  }

  // tokens: those of the lane that lie within M; the others are multiplied as zeros.
  DEVICE void multiply_step(Eight<T> (&token)[4], int tokens, const Dropout& dropout) {
    Factor factor;
    factor.load(v_at, offset);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      v_at[i] += 16 * GRAD_PROJECT_WARPS * v_down;
      if (DROPS) {
        dropout.drop(token[i], counter[i]);
        counter[i] += 16 * GRAD_PROJECT_WARPS * dropout.groups;
      }
#pragma unroll
      for (int n = 0; n < Eight<T>::WORDS; ++n)
        token[i].word[n] = i < tokens ? token[i].word[n] : 0;
#pragma unroll
      for (int b = 0; b < Factor::BLOCKS; ++b) {
#pragma unroll
        for (int n = 0; n < Neighbours<T, Factor::WIDTH>::WORDS; ++n)
          factor.token[b][i].word[n] = i < tokens ? factor.token[b][i].word[n] : 0;
      }
    }
    RowFragment<T> rows[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) rows[j] = token_rows(token, j);
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
      const ColumnFragment<T> ranks = factor.column(t);
#pragma unroll
      for (int j = 0; j < 4; ++j) multiply(sum[j][t], rows[j], ranks);
    }
  }

  // Add a block's steps from `first` on, of which the warp takes every GRAD_PROJECT_WARPS-th.
  DEVICE void run(int64 first, int64 steps, int column, int first_rank, const Dropout& dropout) {
    const int c = threadIdx.x & 3, inside = K - column;
    const int64 end = least(first + steps, M / 16);
    int64 step = first + (threadIdx.x >> 5);
    // Columns beyond K are the last ones again, and are not stored.
    const int own = ALIGNED ? least(column, K - 8) : column;
    start(own, first_rank, 16 * step + 4 * c, dropout.groups);
    int left = int(end - step);
    Eight<T> even[4];
    if constexpr (TILES > 4) {
      // Beside the sums of 64 ranks there are no registers for a second buffer.
#pragma unroll 1
      for (; left > 0; left -= GRAD_PROJECT_WARPS) {
        load(even, inside);
        multiply_step(even, 4, dropout);
      }
    } else {
      Eight<T> odd[4];
      if (left > 0) load(even, inside);
#pragma unroll 1
      while (left > 0) {
        left -= GRAD_PROJECT_WARPS;
        if (left > 0) load(odd, inside);
        multiply_step(even, 4, dropout);
        if (left <= 0) break;
        left -= GRAD_PROJECT_WARPS;
        if (left > 0) load(even, inside);
        multiply_step(odd, 4, dropout);
      }
    }
    // The last tokens, if they are fewer than sixteen.
    step = M / 16;
    if (M % 16 && step >= first && step < first + steps &&
        (step - first) % GRAD_PROJECT_WARPS == threadIdx.x >> 5) {
      start(own, first_rank, 16 * step + 4 * c, dropout.groups);
      load(even, inside);
      multiply_step(even, least(int(M % 16) - 4 * c, 4), dropout);
    }
  }

  // out [R,K] receives the sums.
  DEVICE void store(float* out, int column, int first_rank, float scale) const {
    const int c = threadIdx.x & 3;
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const int rank = first_rank + Factor::rank(t, 2 * c + n);
        if (rank >= R) continue;
        float value[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) value[j] = sum[j / 2][t][j % 2 * 2 + n] * scale;
        store_eight<ALIGNED>(out + int64(rank) * K + column, rounded_eight<float>(value),
                             K - column);
      }
    }
  }
};

}  // namespace lorafast
