// out [M,K] = (out if ACCUMULATES) + mask⊙x·scale, rounded once; rows from first_row on of an
// activation. Grid (⌈M·⌈K/8⌉/256⌉), 256 threads: eight neighbours each, one call of Philox.
// LORAFAST_DTYPE is that of x and out, whose rows are dense.
//
// Flags: 2 ALIGNED: x has unit `right`, rows of x and out are 16 bytes aligned, K is a multiple of
// eight; 4 ACCUMULATES: out is read, and x is fp32.
#include "form.cuh"
#include "philox.cuh"

using namespace lorafast;

constexpr bool ALIGNED = has(2), ACCUMULATES = has(4);

template <bool ADDS>
struct Source {
  using type = Number;
};
template <>
struct Source<true> {
  using type = float;
};
using X = Source<ACCUMULATES>::type;

LORAFAST_ENTRY(256, 1)
drop(const X* x, const int64* seed, Number* out, int64 first_row, int64 M, int64 x_down,
     int64 x_right, int64 out_down, int64 groups, int K, uint32 threshold, float scale) {
  const int64 thread = int64(blockIdx.x) * 256 + threadIdx.x, row = thread / groups;
  const int column = int(thread % groups) * 8;
  if (row >= M) return;
  Number* to = out + row * out_down + column;
  Eight<X> from;
  Eight<Number> before;
  load_eight<ALIGNED, true>(from, x + row * x_down + column * x_right, x_right, K - column);
  // Not through the cache of constants: the kernel writes it.
  if (ACCUMULATES) load_written<ALIGNED>(before, to, K - column);
  Dropout(seed, groups, threshold).drop(from, uint64((first_row + row) * groups + column / 8));
  float value[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) value[i] = from[i] * scale + (ACCUMULATES ? before[i] : 0.0f);
  store_eight<ALIGNED>(to, rounded_eight<Number>(value), K - column);
}
