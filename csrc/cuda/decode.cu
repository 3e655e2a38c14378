// y [M,N] = gain⊙(x Wᵀ + h (s·row_scale⊙B)ᵀ) + bias of M <= 8·TILES tokens, rounded once. Grid
// (⌈N/32⌉, splits), 512 threads. W [N,K] and x have dense rows, 16 bytes aligned, and K is a
// multiple of 8. y and inner, which receives what gain and bias are applied to, are dense. Of at
// most 16·DECODE_WARPS ranks. inner, scale, row_scale, gain and bias may be
// null; gain is m/norm, or m if norm is null; s is scaling, and
// scale if that is not null.
//
// Flags: 4 PARTS: y is fp32 [splits,M,N], sums for decode_finish, which has inner, gain and bias;
// without it there is one split. `steps` times 32 columns are a split.
#include "decode.cuh"
#include "form.cuh"

using namespace lorafast;

constexpr bool PARTS = has(4);
constexpr int ROWS = 2 * DECODE_GROUPS;

LORAFAST_ENTRY(32 * DECODE_WARPS, 1)
decode(const Number* W, const Number* x, const Number* h, const void* B, const void* scale,
       const void* row_scale, const void* m, const float* norm, const void* bias, void* y,
       Number* inner, int64 M, int64 N, int64 W_down, int64 x_down, int64 h_down, int64 h_right,
       int64 B_down, int64 B_right, int K, int R, int steps, int B_dtype, int scale_dtype,
       int row_scale_dtype, int m_dtype, int bias_dtype, float scaling) {
  __shared__ float buffer[DECODE_WARPS / 2 * DECODE_GROUPS * FORM_TILES * 4 * 32];
  const int g = (threadIdx.x & 31) >> 2, c = threadIdx.x & 3, warp = threadIdx.x >> 5;
  const int64 row0 = int64(blockIdx.x) * 16 * DECODE_GROUPS + g;
  // Tokens beyond M are the last one again, and are not stored.
  const int64 token = least<int64>(g, M - 1), x_next = least<int64>(g + 8, M - 1) - token;
  Project<Number, Number, FORM_TILES, DECODE_GROUPS, false, true, DECODE_WARPS> product{
      W, W_down, 1, x_next * x_down, N, K};
  if (16 * warp < R && blockIdx.y == 0) {
    const float s = scaling * (scale ? number_at(scale, scale_dtype, 0) : 1.0f);
    const LowRank<Number> low_rank{h,       B, row_scale, h_down,          h_right, B_down,
                                   B_right, R, B_dtype,   row_scale_dtype, s};
    low_rank.add(product.sum, 16 * warp, row0, N, M);
  }
  float row_gain[ROWS], row_bias[ROWS];
  int64 row[ROWS];
#pragma unroll
  for (int i = 0; i < ROWS; ++i) {
    row[i] = least(row0 + 8 * i, N - 1);
    row_gain[i] = 1;
    row_bias[i] = 0;
  }
  // On their way while W is read.
  if (!PARTS && warp == 0 && m) numbers_at(row_gain, m, m_dtype, row);
  if (!PARTS && warp == 0 && m && norm) {
#pragma unroll
    for (int i = 0; i < ROWS; ++i) row_gain[i] = divided(row_gain[i], __ldg(norm + row[i]));
  }
  if (!PARTS && warp == 0 && bias) numbers_at(row_bias, bias, bias_dtype, row);
  product.run(blockIdx.y * steps, steps, row0, x + token * x_down, Dropout(nullptr, 0, 0));
  add_over_warps<DECODE_WARPS, DECODE_GROUPS * FORM_TILES * 4>(
      reinterpret_cast<float (&)[DECODE_GROUPS * FORM_TILES * 4]>(product.sum), buffer);
  if (warp) return;
#pragma unroll
  for (int i = 0; i < DECODE_GROUPS * FORM_TILES * 4; ++i) {
    const int group = i / (4 * FORM_TILES), tile = i / 4 % FORM_TILES;
    const int n = 2 * group + i % 4 / 2, m = 8 * tile + 2 * c + i % 2;
    if (row0 + 8 * n >= N || m >= M) continue;
    const int64 at = m * N + row0 + 8 * n;
    const float sum = product.sum[group][tile][i % 4];
    if constexpr (PARTS) {
      static_cast<float*>(y)[blockIdx.y * M * N + at] = sum;
    } else {
      store_output(static_cast<Number*>(y), inner, at, sum, row_gain[n], row_bias[n]);
    }
  }
}
