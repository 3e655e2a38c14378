// out fp32 [n] = scale·Σ parts fp32 [splits,n], added in order; its root with flag 1. Grid
// (⌈n/256⌉), 256 threads.
#include "core.cuh"
#include "form.cuh"

using namespace lorafast;

constexpr bool ROOT = has(1);

LORAFAST_ENTRY(256, 1)
sum_parts(const float* parts, float* out, int64 n, int splits, float scale) {
  const int64 i = int64(blockIdx.x) * 256 + threadIdx.x;
  if (i >= n) return;
  const float sum = scale * sum_in_order(parts + i, n, splits);
  out[i] = ROOT ? __fsqrt_rn(sum) : sum;
}
