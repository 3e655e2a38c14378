// out fp32 [splits,N] or [splits,K] = the sums of squares of the rows (BY_ROW) or columns of W +
// sBA, one part for each split of their length; or their roots. Grid (⌈N/32⌉ or ⌈K/32⌉, splits),
// 256 threads, or 384 for up to 16 ranks beside a 16-bit W; a split is `steps` times 32 numbers.
// TILES are 2, 4 and 8, and 16 for any more ranks, of which 64 are multiplied at once.
//
// B [N,·] and A [K,·], the transposed one, are fp32, rounded to tf32 unless W is fp32 and
// multiplied exactly, padded with zeros to a multiple of 32 rows and of the ranks of a form, and
// their rows are 16 bytes aligned. But B (BY_ROW) or A has R ranks and any strides if all are
// multiplied at once; fixed_right is its other one. s is scaling, and scale if that is not null;
// with more ranks s is multiplied into one of them before.
//
// Flags: 1 BY_ROW; 2 ALIGNED: W has unit `right`, rows 16 bytes aligned, K a multiple of eight; 4
// ACROSS, with both and unless there are more ranks than are multiplied at once: A is fp32 [R,K],
// rounded here, R a multiple of four, rows 16 bytes aligned.
#include "form.cuh"
#include "row_norm.cuh"

using namespace lorafast;

constexpr bool BY_ROW = has(1), ALIGNED = has(2), ACROSS = has(4);
constexpr bool MANY = FORM_TILES > MOST_TILES;
constexpr int BLOCKS = (MANY ? MOST_TILES : FORM_TILES + 1) / 2;
// As many as there are registers for.
constexpr int WARPS = FORM_TILES <= 2 && sizeof(Number) == 2 ? 12 : 8;

LORAFAST_ENTRY(32 * WARPS, 1)
row_norm(const Number* W, const float* B, const float* A, const void* scale, float* out,
         int64 W_down, int64 W_right, int64 B_down, int64 A_down, int64 fixed_right, int N, int K,
         int R, int steps, int scale_dtype, int root, float scaling) {
  __shared__ float buffer[32 * WARPS];
  const int own = blockIdx.x * 32, passes = (R + 16 * BLOCKS - 1) / (16 * BLOCKS);
  const float s = scaling * (scale ? number_at(scale, scale_dtype, 0) : 1.0f);
  RowNorm<Number, WARPS, BLOCKS, MANY, BY_ROW, ALIGNED, ACROSS> norm{
      W, W_down, W_right, B, A, B_down, A_down, fixed_right, N, K, R, passes, s};
  norm.run(own, blockIdx.y * steps, steps);
  norm.store(out + int64(blockIdx.y) * (BY_ROW ? N : K), own, root, buffer);
}
