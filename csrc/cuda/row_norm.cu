// out fp32 [splits,N] or [splits,K] = the sums of squares of the rows (BY_ROW) or columns of W +
// BA, one part for each split of their length. Grid (⌈N/128⌉ or ⌈K/128⌉, splits), 128 threads; a
// split is `steps` times 32 numbers. TILES are 2, 4 and 8, and 16 for any more ranks, of which 64
// are multiplied at once. B [N,·] and A [K,·], the transposed one, are fp32; s is multiplied into
// one of them before.
//
// Flags: 1 BY_ROW; 2 ALIGNED: W has unit `right`, rows 16 bytes aligned, K a multiple of eight.
#include "form.cuh"
#include "row_norm.cuh"

using namespace lorafast;

constexpr bool BY_ROW = has(1), ALIGNED = has(2), MANY = FORM_TILES > MOST_TILES;
constexpr int BLOCKS = (MANY ? MOST_TILES : FORM_TILES + 1) / 2;

LORAFAST_ENTRY(32 * ROW_NORM_WARPS, 1)
row_norm(const Number* W, const float* B, const float* A, float* out, int64 W_down, int64 W_right,
         int64 B_down, int64 A_down, int N, int K, int R, int steps) {
  const int own = (blockIdx.x * ROW_NORM_WARPS + (threadIdx.x >> 5)) * 32;
  const int first = blockIdx.y * steps * 32, row = BY_ROW ? own : first,
            column = BY_ROW ? first : own;
  RowNorm<Number, BLOCKS, MANY, BY_ROW, ALIGNED> norm{
      W, W_down, W_right, B, A, B_down, A_down, N, K, (R + 16 * BLOCKS - 1) / (16 * BLOCKS)};
  norm.run(row, column, steps);
  norm.store(out + int64(blockIdx.y) * (BY_ROW ? N : K), row, column);
}
