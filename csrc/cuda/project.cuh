// project: h = drop(x) Aᵀ and h' = core(h), reading x once. decode (decode.cuh) has the same loop,
// with W in the place of x and the tokens in that of the ranks.
//
// A warp computes 16·GROUPS rows. A step of the loop takes 32 columns: a lane loads eight
// neighbours of each of its rows, which is one call of Philox and two operands of a tensor core as
// they lie. The warps of a block take steps in turn, and their sums are added at the end. x of the
// next step is on its way while one is multiplied.
#pragma once
#include "core.cuh"
#include "philox.cuh"

namespace lorafast {

constexpr int PROJECT_WARPS = 4;

// Factor: the type of A, T or fp32, which is rounded here.
template <class T, class Factor, int TILES, int GROUPS, bool DROPS, bool ALIGNED,
          int WARPS = PROJECT_WARPS>
struct Project {
  static constexpr int ROWS = 2 * GROUPS;
  const T* x;
  int64 x_down, x_right;
  int64 A_next;  // from a lane's row of one tile of A to its row of the next
  int64 M;
  int K;

  float sum[GROUPS][TILES][4] = {};
  // Where the step to be loaded and the step to be multiplied lie. They are moved on, because the
  // compiler would compute them anew in every step; and of x it is one pointer and not one a row,
  // because the compiler would put off the load of a row until its pointer can be changed in place.
  const char* x_at;
  int64 x_offset[ROWS];
  const Factor* A_at;
  uint64 counter[ROWS];
  int column;

  // first_row: that of row g of the warp's first group. group: the lane's eight columns of the
  // step.
  DEVICE void start(int64 first_row, const Factor* A_row, int step, int group, int64 groups) {
    column = 32 * step + 8 * group;
    x_at = reinterpret_cast<const char*>(x);
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      // Rows beyond M are the last one again, and are not stored.
      const int64 row = least(first_row + 8 * i, M - 1);
      x_offset[i] = pinned(int64((row * x_down + column * x_right) * sizeof(T)));
      counter[i] = uint64(row * groups + column / 8);
    }
    A_at = A_row + column;
  }

  DEVICE void load(Eight<T> (&to)[ROWS]) {
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const T* from = reinterpret_cast<const T*>(x_at + x_offset[i]);
      load_eight<ALIGNED, true>(to[i], from, x_right, K - column);
    }
    x_at += 32 * WARPS * sizeof(T) * (ALIGNED ? 1 : x_right);
    column += 32 * WARPS;
  }

  // inside: false for a lane whose columns lie beyond K, which multiplies zeros.
  DEVICE void multiply_step(Eight<T> (&rows)[ROWS], bool inside, const Dropout& dropout) {
    Eight<T> factor[TILES];
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
      Eight<Factor> one;
      load_wide<false>(one, A_at + t * A_next);
      factor[t] = rounded_eight<T>(one);
    }
    A_at += 32 * WARPS;
    if (DROPS) {
#pragma unroll
      for (int i = 0; i < ROWS; ++i) {
        dropout.drop(rows[i], counter[i]);
        counter[i] += 4 * WARPS;
      }
    }
#pragma unroll
    for (int i = 0; i < Eight<T>::WORDS; ++i) {
#pragma unroll
      for (int j = 0; j < ROWS; ++j) rows[j].word[i] = inside ? rows[j].word[i] : 0;
#pragma unroll
      for (int t = 0; t < TILES; ++t) factor[t].word[i] = inside ? factor[t].word[i] : 0;
    }
#pragma unroll
    for (int part = 0; part < 2; ++part) {
#pragma unroll
      for (int t = 0; t < TILES; ++t) {
        const ColumnFragment<T> factors = column_fragment(factor[t], part);
#pragma unroll
        for (int i = 0; i < GROUPS; ++i)
          multiply(sum[i][t], row_fragment(rows[2 * i], rows[2 * i + 1], part), factors);
      }
    }
  }

  // Add a block's steps from `first` on, of which the warp takes every WARPS-th.
  DEVICE void run(int first, int steps, int64 row, const Factor* A_row, const Dropout& dropout) {
    const int c = threadIdx.x & 3, end = least(first + steps, K / 32);
    int step = first + (threadIdx.x >> 5);
    start(row, A_row, step, c, dropout.groups);
    // Two buffers, or the registers of a row could not be loaded before it is multiplied.
    Eight<T> even[ROWS], odd[ROWS];
    if (step < end) load(even);
#pragma unroll 1
    while (step < end) {
      step += WARPS;
      if (step < end) load(odd);
      multiply_step(even, true, dropout);
      if (step >= end) break;
      step += WARPS;
      if (step < end) load(even);
      multiply_step(odd, true, dropout);
    }
    // The last step of a row, if it is not whole.
    if (K % 32 && step == K / 32 && step < first + steps) {
      const bool inside = 32 * step + 8 * c < K;
      start(row, A_row, step, inside ? c : 0, dropout.groups);
      load(even);
      multiply_step(even, inside, dropout);
    }
  }
};

}  // namespace lorafast
