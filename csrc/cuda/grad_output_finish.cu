// dB [N,R] = out_scale⊙P and d_out_scale [N] = rowsum(P⊙B), P = s·gain⊙Σ parts, added in order.
// Grid (⌈N/32⌉), 256 threads. The parts are R - skipped rows of fp32 [splits,width,N] from `parts`
// on, those of B's columns from `skipped` on. The first `frozen` columns of dB are zero. dB and
// d_out_scale may be null, and so may s, gain and out_scale, which then count as 1.
#include "form.cuh"

using namespace lorafast;

LORAFAST_ENTRY(256, 1)
grad_output_finish(const float* parts, const void* gain, const void* out_scale, const void* B,
                   const void* scale, float* dB, float* d_out_scale, int64 B_down, int64 B_right,
                   int N, int R, int width, int skipped, int frozen, int splits, int gain_dtype,
                   int out_dtype, int B_dtype, int scale_dtype, float scaling) {
  __shared__ float sums[8][32];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, n = blockIdx.x * 32 + lane;
  float own = 0;
  if (n < N) {
    float s = scaling * (scale ? number_at(scale, scale_dtype, 0) : 1.0f);
    if (gain) s *= number_at(gain, gain_dtype, n);
    const float out = out_scale ? number_at(out_scale, out_dtype, n) : 1.0f;
    for (int r = warp; r < R; r += 8) {
      float P = 0;
      if (r >= skipped) {
#pragma unroll 4
        for (int split = 0; split < splits; ++split)
          P += __ldg(parts + (int64(split) * width + r - skipped) * N + n);
      }
      P *= s;
      if (d_out_scale) own += P * number_at(B, B_dtype, n * B_down + r * B_right);
      if (dB) dB[int64(n) * R + r] = r < frozen ? 0.0f : P * out;
    }
  }
  if (!d_out_scale) return;
  sums[warp][lane] = own;
  __syncthreads();
  if (warp || n >= N) return;
  for (int i = 1; i < 8; ++i) own += sums[i][lane];
  d_out_scale[n] = own;
}
