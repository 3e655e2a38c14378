// out [M,N] = gain⊙((out if ADDS) + mask⊙(h (sF)ᵀ)·drop_scale) + bias, rounded once. Grid (⌈M/128⌉,
// splits of the columns), 128 threads; a block takes `steps` times 32 columns. TILES are 2, 4 and
// 8, and 16 for any more ranks, of which 64 are multiplied at once. out and inner are dense.
//
// Flags: 1 DROPS, by the mask of [M,N]; 2 ALIGNED: N is a multiple of eight, out, inner and bias
// are 16 bytes aligned; 4 ADDS; 8 GAINS: gain [N] is m/norm, or m if norm is null, 1 if m is; norm
// and bias are fp32, and bias may be null; 16 KEEPS: inner receives what gain and bias are applied
// to; 32 RAW: F is fp32 [N,R], and s is scaling, and scale if that is not null; of at most 64 ranks
// (32 in fp32), and ALIGNED. s is 1 for any other F. 64 ACROSS: a RAW F is [R,N].
#include "form.cuh"
#include "low_rank_add.cuh"

using namespace lorafast;

constexpr bool DROPS = has(1), ALIGNED = has(2), ADDS = has(4), GAINS = has(8), KEEPS = has(16);
constexpr bool RAW = has(32), ACROSS = has(64);
constexpr bool MANY = FORM_TILES > MOST_TILES;
constexpr int BLOCKS = (MANY ? MOST_TILES : FORM_TILES + 1) / 2;

constexpr int HELD = FORM_TILES > 2 || sizeof(Number) == 4 ? 1 : GAINS ? GAINED_BLOCKS : 3;

LORAFAST_ENTRY(32 * LOW_RANK_ADD_WARPS, HELD)
low_rank_add(const Number* h, const void* F, const void* scale, const int64* seed, const void* m,
             const float* norm, const float* bias, Number* out, Number* inner, int64 M,
             int64 h_down, int64 F_down, int64 groups, int N, int R, int steps, uint32 threshold,
             int scale_dtype, int m_dtype, float scaling, float drop_scale) {
  alignas(16) __shared__ float gains[GAINS ? 32 * GAINED_STEPS : 1];
  const int lane = threadIdx.x & 31, passes = (R + 16 * BLOCKS - 1) / (16 * BLOCKS);
  const float s = scaling * (RAW && scale ? number_at(scale, scale_dtype, 0) : 1.0f);
  LowRankAdd<Number, BLOCKS, MANY, DROPS, ADDS, GAINS, KEEPS, ALIGNED, RAW, ACROSS> product{
      h, F, out, inner, h_down, F_down, M, N, R, passes, s, drop_scale, {gains, bias, 0}};
  product.first_row =
      (int64(blockIdx.x) * LOW_RANK_ADD_WARPS + (threadIdx.x >> 5)) * 32 + (lane >> 2);
  const Dropout dropout(DROPS ? seed : nullptr, groups, threshold);
  const int column = blockIdx.y * 32 * steps;
  if constexpr (GAINS) {
#pragma unroll 1
    for (int first = 0; first < steps; first += GAINED_STEPS) {
      product.epilogue.load_gains({m, norm, m_dtype}, column + 32 * first, N);
      product.run(column + 32 * first, least(steps - first, GAINED_STEPS), dropout);
    }
  } else {
    product.run(column, steps, dropout);
  }
}
