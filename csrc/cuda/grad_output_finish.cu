// What is left to do of grad_output's parts, which are added in order: u [M,R] and v = core(u), u
// of LORAFAST_DTYPE and at most 8·TILES ranks; dB [N,R] = out_scale⊙P and d_out_scale [N] =
// rowsum(P⊙B), P = s·gain⊙Σ parts; and sums [sums_n]. Grid (⌈M/128⌉ + ⌈N/32⌉ + ⌈sums_n/256⌉), 256
// threads, without the first blocks if u_parts is null.
//
// u_parts fp32 [u_splits,M,R], sum_parts fp32 [sum_splits,sums_n]. The parts of P are R - skipped
// rows of fp32 [splits,width,N] from `parts` on, those of B's columns from `skipped` on. The first
// `frozen` columns of dB are zero. v, dB and d_out_scale may be null, and so may s, m and
// out_scale, which then count as 1. gain = m/norm, or m if norm is null; gain_out [N] receives it,
// d_m [N] = Σ/norm of the second N sums, each divided by the gain before with by_gain, and d_norm
// [N] = -d_m·gain; each may be null. A quotient by 0 is 0.
#include "core.cuh"
#include "form.cuh"

using namespace lorafast;

LORAFAST_ENTRY(256, 1)
grad_output_finish(const float* parts, const void* m, const float* norm, const void* out_scale,
                   const void* B, const void* scale, float* dB, float* d_out_scale, float* gain_out,
                   float* d_m, float* d_norm, const float* u_parts, Number* u, Number* v,
                   const void* core, const float* sum_parts, float* sums, int64 B_down,
                   int64 B_right, int64 M, int64 core_down, int64 core_right, int64 sums_n, int N,
                   int R, int width, int skipped, int frozen, int splits, int u_splits,
                   int sum_splits, int by_gain, int m_dtype, int out_dtype, int B_dtype,
                   int scale_dtype, int core_dims, int core_dtype, float scaling) {
  __shared__ float own_sums[8][32];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int u_blocks = u_parts ? int((M + 127) / 128) : 0, P_blocks = (N + 31) / 32;
  const int block = int(blockIdx.x) - u_blocks;
  const Gain gain{m, norm, m_dtype};
  if (block < 0) {
    const int64 row = int64(blockIdx.x) * 128 + warp * 16 + (lane >> 2);
    finish_parts<FORM_TILES>(Projection<Number>{u, v, M, R, 0}, u_parts, row, u_splits, 1.0f,
                             {core, core_dtype, core_dims, core_down, core_right});
    return;
  }
  if (block >= P_blocks) {
    const int64 i = int64(block - P_blocks) * 256 + threadIdx.x;
    if (i >= sums_n) return;
    const float sum = sum_in_order(sum_parts + i, sums_n, sum_splits);
    sums[i] = sum;
    if (!d_m || i < N) return;
    const float own_gain = gain.at(i - N), d_gain = by_gain ? divided(sum, own_gain) : sum;
    const float quotient = divided(d_gain, __ldg(norm + i - N));
    d_m[i - N] = quotient;
    if (d_norm) d_norm[i - N] = -quotient * own_gain;
    return;
  }
  const int n = block * 32 + lane;
  float own = 0;
  if (n < N) {
    const float own_gain = gain.at(n);
    const float s = scaling * (scale ? number_at(scale, scale_dtype, 0) : 1.0f) * own_gain;
    if (gain_out && warp == 0) gain_out[n] = own_gain;
    const float out = out_scale ? number_at(out_scale, out_dtype, n) : 1.0f;
    for (int r = warp; r < R; r += 8) {
      const int64 at = int64(r - skipped) * N + n;
      const float P = r < skipped ? 0.0f : s * sum_in_order(parts + at, int64(width) * N, splits);
      if (d_out_scale) own += P * number_at(B, B_dtype, n * B_down + r * B_right);
      if (dB) dB[int64(n) * R + r] = r < frozen ? 0.0f : P * out;
    }
  }
  if (!d_out_scale) return;
  own_sums[warp][lane] = own;
  __syncthreads();
  if (warp || n >= N) return;
  for (int i = 1; i < 8; ++i) own += own_sums[i][lane];
  d_out_scale[n] = own;
}
