// out [M,N] = gain⊙((out if ADDS) + mask⊙(h (sF)ᵀ)·drop_scale) + bias, rounded once. Grid (⌈M/128⌉,
// splits of the columns), 128 threads; a block takes `steps` times 32 columns. TILES are 2, 4 and
// 8, and 16 for any more ranks, of which 64 are multiplied at once. out and inner are dense.
//
// Flags: 1 DROPS, by the mask of [M,N]; 2 ALIGNED: N is a multiple of eight, out, inner, gain and
// bias are 16 bytes aligned; 4 ADDS; 8 GAINS: gain and bias, fp32 [N], either of which may be null;
// 16 KEEPS: inner receives what gain and bias are applied to; 32 RAW: F is fp32 [N,R], and s is
// scaling, and scale if that is not null; of at most 64 ranks (32 in fp32), and ALIGNED. s is 1 for
// any other F. 64 ACROSS: a RAW F is [R,N].
#include "form.cuh"
#include "low_rank_add.cuh"

using namespace lorafast;

constexpr bool DROPS = has(1), ALIGNED = has(2), ADDS = has(4), GAINS = has(8), KEEPS = has(16);
constexpr bool RAW = has(32), ACROSS = has(64);
constexpr bool MANY = FORM_TILES > MOST_TILES;
constexpr int BLOCKS = (MANY ? MOST_TILES : FORM_TILES + 1) / 2;

LORAFAST_ENTRY(32 * LOW_RANK_ADD_WARPS, FORM_TILES <= 2 && sizeof(Number) == 2 ? 3 : 1)
low_rank_add(const Number* h, const void* F, const void* scale, const int64* seed,
             const float* gain, const float* bias, Number* out, Number* inner, int64 M,
             int64 h_down, int64 F_down, int64 groups, int N, int R, int steps, uint32 threshold,
             int scale_dtype, float scaling, float drop_scale) {
  const int lane = threadIdx.x & 31, passes = (R + 16 * BLOCKS - 1) / (16 * BLOCKS);
  const float s = scaling * (RAW && scale ? number_at(scale, scale_dtype, 0) : 1.0f);
  LowRankAdd<Number, BLOCKS, MANY, DROPS, ADDS, GAINS, KEEPS, ALIGNED, RAW, ACROSS> product{
      h, F, out, inner, h_down, F_down, M, N, R, passes, s, drop_scale, {gain, bias}};
  product.first_row =
      (int64(blockIdx.x) * LOW_RANK_ADD_WARPS + (threadIdx.x >> 5)) * 32 + (lane >> 2);
  product.run(blockIdx.y * 32 * steps, steps, Dropout(DROPS ? seed : nullptr, groups, threshold));
}
