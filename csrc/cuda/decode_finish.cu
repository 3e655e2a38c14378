// y [M,N] = gain⊙Σ parts + bias, the parts added in order, and inner = Σ parts. Grid (⌈M·N/256⌉),
// 256 threads. parts fp32 [splits,M,N]. LORAFAST_DTYPE is y's; inner, gain and bias may
// be null; gain is m/norm, or m if norm is null.
#include "core.cuh"
#include "decode.cuh"
#include "form.cuh"

using namespace lorafast;

LORAFAST_ENTRY(256, 1)
decode_finish(const float* parts, const void* m, const float* norm, const void* bias, Number* y,
              Number* inner, int64 M, int64 N, int splits, int m_dtype, int bias_dtype) {
  const int64 i = int64(blockIdx.x) * 256 + threadIdx.x;
  if (i >= M * N) return;
  const float sum = sum_in_order(parts + i, M * N, splits);
  store_output(y, inner, i, sum, Gain{m, norm, m_dtype}.at(i % N),
               bias ? number_at(bias, bias_dtype, i % N) : 0.0f);
}
