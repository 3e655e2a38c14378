// out fp32 [n] = scale·Σ parts fp32 [splits,n], added in order; its root with flag 1. Grid
// (⌈n/256⌉), 256 threads.
#include "form.cuh"

using namespace lorafast;

constexpr bool ROOT = has(1);

LORAFAST_ENTRY(256, 1)
sum_parts(const float* parts, float* out, int64 n, int splits, float scale) {
  const int64 i = int64(blockIdx.x) * 256 + threadIdx.x;
  if (i >= n) return;
  float sum = 0;
#pragma unroll 4
  for (int split = 0; split < splits; ++split) sum += __ldg(parts + split * n + i);
  sum *= scale;
  out[i] = ROOT ? __fsqrt_rn(sum) : sum;
}
