// out fp32 [n] = (a/first)/second, each quotient 0 where its divisor is 0; and, if product is not
// null, product = -out·factor. first, second and factor are fp32, and first may be null. Grid
// (⌈n/256⌉), 256 threads.
#include "form.cuh"

using namespace lorafast;

LORAFAST_ENTRY(256, 1)
quotient(const void* a, const float* first, const float* second, const float* factor, float* out,
         float* product, int n, int a_dtype) {
  const int i = blockIdx.x * 256 + threadIdx.x;
  if (i >= n) return;
  float value = number_at(a, a_dtype, i);
  if (first) value = divided(value, __ldg(first + i));
  value = divided(value, __ldg(second + i));
  out[i] = value;
  if (product) product[i] = -value * __ldg(factor + i);
}
