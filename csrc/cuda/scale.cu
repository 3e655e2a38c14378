// out [rows,width] = s·row_scale⊙F·column_scale, rounded once, zeros beyond F [F_rows,F_columns].
// Grid (⌈rows·⌈width/8⌉/256⌉), 256 threads: eight neighbours each. LORAFAST_DTYPE is out's, whose
// rows are dense; F's and the scales' are parameters, and an absent scale counts as 1.
//
// Flags: 2 ALIGNED: F has out's dtype and unit `right`, rows of both are 16 bytes aligned, and
// F_columns and width are equal and a multiple of eight. LORAFAST_TF32: out is rounded to tf32.
#include "form.cuh"

using namespace lorafast;

constexpr bool ALIGNED = has(2);

LORAFAST_ENTRY(256, 1)
scale(const void* F, const void* row_scale, const void* column_scale, const void* scale,
      Number* out, int64 F_rows, int64 rows, int64 F_down, int64 F_right, int64 out_down,
      int F_columns, int width, int F_dtype, int row_dtype, int column_dtype, int scale_dtype,
      float scaling) {
  const int64 thread = int64(blockIdx.x) * 256 + threadIdx.x, groups = (width + 7) / 8;
  const int64 i = thread / groups;
  const int j = int(thread % groups) * 8;
  if (i >= rows) return;
  float s = scaling * (scale ? number_at(scale, scale_dtype, 0) : 1.0f);
  if (row_scale && i < F_rows) s *= number_at(row_scale, row_dtype, i);
  const int inside = i < F_rows ? F_columns - j : 0;
  float value[8] = {};
  if (ALIGNED && inside > 0) {
    Eight<Number> from;
    load_wide<true>(from, static_cast<const Number*>(F) + i * F_down + j);
#pragma unroll
    for (int n = 0; n < 8; ++n) value[n] = from[n];
  }
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    if (n >= inside) continue;
    if (!ALIGNED) value[n] = number_at(F, F_dtype, i * F_down + (j + n) * F_right);
    value[n] *= s;
    if (column_scale) value[n] *= number_at(column_scale, column_dtype, j + n);
    if (LORAFAST_TF32) value[n] = rounded_to_tf32(value[n]);
  }
  store_eight<ALIGNED>(out + i * out_down + j, rounded_eight<Number>(value), width - j);
}
