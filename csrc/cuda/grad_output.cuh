// grad_output: u = dy F, P = dyᵀ h', Σ dy and Σ dy⊙kept, reading dy once from memory.
//
// A warp computes 64 columns and walks along the tokens, sixteen in a step, like grad_project. Both
// sums over tokens are products too: with a factor of ones; and with kept, of which the diagonal is
// wanted, for which each column of dy has a row of its own. u sums over columns instead, for which
// a lane loads the same numbers again in the order of project, from L1; the sums of a block's warps
// are added through shared memory in every step, in a fixed order. With u a block has twice as many
// warps, as many as there are registers for: each block writes a part of u.
#pragma once
#include "grad_project.cuh"

namespace lorafast {

DEVICE constexpr int grad_output_warps(bool u) { return u ? 8 : 4; }
// From sm_100 on the compiler takes more registers, and has none for a second buffer beside all
// sums.
#if __CUDA_ARCH__ >= 1000
constexpr bool BUFFERS_BESIDE_ALL = false;
#else
constexpr bool BUFFERS_BESIDE_ALL = true;
#endif

// s·gain⊙B. B [N,·] has any strides.
struct GainedFactor {
  const float* B;
  Gain gain;
  int64 B_down, B_right;
  float s;
};

template <class T, int TILES, bool U, bool P, bool SUMS, bool DOT, bool ALIGNED>
struct GradOutput {
  using Factor = TokenFactor<T, TILES>;
  static constexpr int WARPS = grad_output_warps(U);
  const T *dy, *kept, *h;
  int64 dy_down, dy_right, kept_down, kept_right, h_down, M;
  float* u;  // [M,u_ranks], this block's part
  int N, u_ranks, h_ranks;
  float* buffer;  // of shared memory: 2·WARPS·8·32

  float product[P ? 4 : 1][TILES][4] = {};
  float total[SUMS ? 4 : 1][4] = {};
  float dot[DOT ? 4 : 1][4] = {};
  RowFragment<T> own_F[2][2];  // sixteen ranks as rows, by halves and quarters of the columns
  // Moved on from step to step, like those of project. across: in the order of project.
  const char *dy_at, *kept_at, *across_at;
  int64 dy_offset[4], kept_offset[4], across_offset[2];
  const T* h_at[4];
  int offset[Factor::BLOCKS];
  // Of the block's u a lane adds one number.
  float* u_at;
  bool u_inside, rank_inside;

  // column: the warp's first one. token: the first one of a step.
  DEVICE void start(int column, int64 token) {
    const int g = (threadIdx.x & 31) >> 2, c = threadIdx.x & 3;
    // Columns beyond N are the last ones again, and are not stored.
    const int own = column_within(column + 8 * g);
    dy_at = across_at = reinterpret_cast<const char*>(dy);
    kept_at = reinterpret_cast<const char*>(kept);
    const int warp = threadIdx.x >> 5, rank = g + warp / 2 % 2 * 8;
    const int64 u_row = token + warp / 4 * 8 + 2 * c + warp % 2;
    u_at = u + u_row * u_ranks + rank;
    rank_inside = rank < u_ranks;
    u_inside = rank_inside && u_row < M;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64 row = least(token + 4 * c + i, M - 1);
      dy_offset[i] = pinned(int64((row * dy_down + own * dy_right) * sizeof(T)));
      if (DOT) kept_offset[i] = pinned(int64((row * kept_down + own * kept_right) * sizeof(T)));
      if (P) h_at[i] = pinned(h + row * h_down);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64 row = least(token + g + 8 * i, M - 1);
      const int64 place = row * dy_down + column_within(column + 8 * c);
      if (U) across_offset[i] = pinned(int64(place * sizeof(T)));
    }
#pragma unroll
    for (int b = 0; b < Factor::BLOCKS; ++b)
      offset[b] = least((b * 8 + g) * Factor::COUNT, h_ranks - Factor::COUNT);
  }

  DEVICE int column_within(int column) const { return ALIGNED ? least(column, N - 8) : column; }

  DEVICE void load(Eight<T> (&to)[4], Eight<T> (&beside)[4], int inside) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const T* from = reinterpret_cast<const T*>(dy_at + dy_offset[i]);
      // With u, what is loaded here is loaded again soon.
      load_eight<ALIGNED, !U>(to[i], from, dy_right, inside);
    }
    dy_at += 16 * dy_down * sizeof(T);
    if (DOT && !U) load_kept(beside, inside);
  }

  // Beside u's numbers there are no registers for kept's of the next step.
  DEVICE void load_kept(Eight<T> (&to)[4], int inside) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const T* from = reinterpret_cast<const T*>(kept_at + kept_offset[i]);
      load_eight<ALIGNED, true>(to[i], from, kept_right, inside);
    }
    kept_at += 16 * kept_down * sizeof(T);
  }

  // tokens: those of the lane that lie within M; the others are multiplied as zeros.
  template <bool RAGGED, bool WHOLE>
  DEVICE void step(Eight<T> (&token)[4], Eight<T> (&beside)[4], int tokens, int column,
                   bool odd_step) {
    Factor factor;
    if (P) factor.load(h_at, offset);
    if (U) step_across<RAGGED, WHOLE>(column, odd_step);
    if (DOT && U) load_kept(beside, N - column - (threadIdx.x & 31) / 4 * 8);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (P) h_at[i] += 16 * h_down;
      if (!RAGGED) continue;
      const bool within = i < tokens;
      clear_unless(within, token[i]);
      if (DOT) clear_unless(within, beside[i]);
#pragma unroll
      for (int b = 0; b < Factor::BLOCKS; ++b)
        if (P) clear_unless(within, factor.token[b][i]);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const RowFragment<T> rows = token_rows(token, j);
#pragma unroll
      for (int t = 0; t < TILES; ++t)
        if (P) multiply(product[j][t], rows, factor.column(t));
      if (SUMS) multiply(total[j], rows, ones());
      if (DOT) {
        // Row g alone with column g of kept's, and row g+8 alone.
        const RowFragment<T> others = token_rows(beside, j);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          RowFragment<T> alone;
          ColumnFragment<T> column_of;
#pragma unroll
          for (int i = 0; i < 2 * int(sizeof(T)); ++i)
            alone.word[i] = i % 2 == half ? rows.word[i] : 0;
#pragma unroll
          for (int i = 0; i < int(sizeof(T)); ++i) column_of.word[i] = others.word[2 * i + half];
          multiply(dot[j], alone, column_of);
        }
      }
    }
  }

  static DEVICE ColumnFragment<T> ones() {
    ColumnFragment<T> to;
    const uint32 one = sizeof(T) == 4 ? 0x3F800000u : rounded_one();
#pragma unroll
    for (int i = 0; i < int(sizeof(T)); ++i) to.word[i] = one;
    return to;
  }
  static DEVICE uint32 rounded_one() {
    if constexpr (sizeof(T) == 4) return 0;
    if constexpr (sizeof(T) == 2) return rounded_pair<T>(1.0f, 1.0f);
  }

  template <int COUNT>
  static DEVICE void clear_unless(bool within, Neighbours<T, COUNT>& one) {
#pragma unroll
    for (int n = 0; n < Neighbours<T, COUNT>::WORDS; ++n) one.word[n] = within ? one.word[n] : 0;
  }

  // The step's sixteen rows of u: the warp's columns, then the block's. The ranks are the rows of
  // the tensor cores, so that numbers of dy are multiplied as they lie. Two buffers alternate: what
  // is written in a step is read before the barrier of the next one.
  template <bool RAGGED, bool WHOLE>
  DEVICE void step_across(int column, bool odd_step) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, c = lane & 3;
    float part[2][4] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      Eight<T> row;
      const int inside = N - column - i % 2 * 32 - 8 * c;
      // Columns beyond N are others again, and are multiplied as zeros.
      const int right = i % 2 && (WHOLE || inside > 0) ? 32 : 0;
      load_wide<false>(row, reinterpret_cast<const T*>(across_at + across_offset[i / 2]) + right);
      if (!WHOLE) clear_unless(inside > 0, row);
#pragma unroll
      for (int piece = 0; piece < 2; ++piece)
        multiply(part[i / 2], own_F[i % 2][piece], column_fragment(row, piece));
    }
    across_at += 16 * dy_down * sizeof(T);
    float* own = buffer + odd_step * WARPS * 256 + lane;
#pragma unroll
    for (int i = 0; i < 8; ++i) own[(warp * 8 + i) * 32] = part[i / 4][i % 4];
    __syncthreads();
    float sum = 0;
#pragma unroll
    for (int other = 0; other < WARPS; ++other) sum += own[(other * 8 + warp) * 32];
    if (RAGGED ? u_inside : rank_inside) *u_at = sum;
    u_at += 16 * u_ranks;
  }

  // F rounded once, zeros beyond u_ranks and N.
  DEVICE void load_factor(const GainedFactor& F, int column) {
    const int g = (threadIdx.x & 31) >> 2, c = threadIdx.x & 3;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int first = column + 32 * half + 8 * c;
      const float* from = F.B + first * F.B_down + g * F.B_right;
      float value[2][8];
      // The lanes of the same columns divide one of eight each.
      const float own_s = first < N ? F.s * F.gain.at(first + g) : 0.0f;
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const float s = __shfl_sync(0xFFFFFFFFu, own_s, 4 * n + c);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const bool within = first < N && g + 8 * i < u_ranks;
          value[i][n] = within ? s * __ldg(from + n * F.B_down + 8 * i * F.B_right) : 0.0f;
        }
      }
      const Eight<T> upper = rounded_eight<T>(value[0]), lower = rounded_eight<T>(value[1]);
#pragma unroll
      for (int piece = 0; piece < 2; ++piece)
        own_F[half][piece] = row_fragment(upper, lower, piece);
    }
  }

  // Add `steps` times sixteen tokens from step `first` on. All warps of a block take all steps.
  // WHOLE: all columns of the block lie within N.
  template <bool WHOLE>
  DEVICE void run(int64 first, int64 steps, int column) {
    const int g = (threadIdx.x & 31) >> 2, c = threadIdx.x & 3, inside = N - column - 8 * g;
    start(column, 16 * first);
    int left = int(least(first + steps, M / 16) - first);
    const bool ragged = M % 16 && first + steps > M / 16 && first <= M / 16;
    Eight<T> even[4], even_beside[4];
    if constexpr (U && DOT && !BUFFERS_BESIDE_ALL) {
      bool odd_step = false;
#pragma unroll 1
      for (; left > 0; --left) {
        load(even, even_beside, inside);
        step<false, WHOLE>(even, even_beside, 4, column, odd_step);
        odd_step = !odd_step;
      }
    } else {
      Eight<T> odd[4], odd_beside[4];
      if (left > 0) load(even, even_beside, inside);
#pragma unroll 1
      while (left > 0) {
        if (--left > 0) load(odd, odd_beside, inside);
        step<false, WHOLE>(even, even_beside, 4, column, false);
        if (left <= 0) break;
        if (--left > 0) load(even, even_beside, inside);
        step<false, WHOLE>(odd, odd_beside, 4, column, true);
      }
    }
    if (!ragged) return;
    // The buffer of u may have been read a moment ago.
    if (U) __syncthreads();
    start(column, M / 16 * 16);
    load(even, even_beside, inside);
    step<true, WHOLE>(even, even_beside, least(int(M % 16) - 4 * c, 4), column, false);
  }

  // product [h_ranks,N]; sums [N] and, if there are two, [N] more behind it.
  DEVICE void store(float* to, float* sums, int column) const {
    const int g = (threadIdx.x & 31) >> 2, c = threadIdx.x & 3, own = column + 8 * g;
    float value[8];
#pragma unroll
    for (int i = 0; i < TILES * 2; ++i) {
      const int rank = Factor::rank(i / 2, 2 * c + i % 2);
      if (!P || rank >= h_ranks) continue;
#pragma unroll
      for (int j = 0; j < 8; ++j) value[j] = product[P ? j / 2 : 0][i / 2][j % 2 * 2 + i % 2];
      store_eight<ALIGNED>(to + int64(rank) * N + own, rounded_eight<float>(value), N - own);
    }
    if (SUMS && c == 0) {
#pragma unroll
      for (int j = 0; j < 8; ++j) value[j] = total[SUMS ? j / 2 : 0][j % 2 * 2];
      store_eight<ALIGNED>(sums + own, rounded_eight<float>(value), N - own);
    }
    if (DOT && c == g / 2) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float* four = dot[DOT ? j / 2 : 0];
        value[j] = g % 2 ? four[j % 2 * 2 + 1] : four[j % 2 * 2];
      }
      store_eight<ALIGNED>(sums + (SUMS ? N : 0) + own, rounded_eight<float>(value), N - own);
    }
  }
};

}  // namespace lorafast
