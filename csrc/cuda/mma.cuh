// Products of tensor cores: a sum over sixteen numbers, for sixteen rows and eight columns a warp.
//
// A lane is 4·g + c. Of an operand it holds four numbers along the sum for its row (or column):
// which four is left to the kernel, as long as both operands agree, because a sum has no order.
// That is why a lane may load neighbours and multiply them as they lie. The lane's results are
//   sum[0], sum[1]: row g, columns 2c and 2c+1;      sum[2], sum[3]: row g+8.
#pragma once
#include "types.cuh"

#ifndef LORAFAST_TF32
#define LORAFAST_TF32 0
#endif

namespace lorafast {

// fp32 operands are multiplied in fp32, outside the tensor cores, unless the form says tf32.
constexpr bool EXACT_FP32 = !LORAFAST_TF32;

// fp32 rounded to the 10 bits of tf32's mantissa. Not of a NaN: the sum could become a number.
DEVICE float rounded_to_tf32(float value) {
  const float near = from_bits((__float_as_uint(value) + 0x1000u) & 0xFFFFE000u);
  return value == value ? near : value;
}

// Four numbers of row g and of row g+8, in the order of the registers of mma.sync.
template <class T>
struct RowFragment {
  uint32 word[2 * sizeof(T)];
};
// Four numbers of column g.
template <class T>
struct ColumnFragment {
  uint32 word[sizeof(T)];
};

// The fragment of neighbours 4·part to 4·part+3 of both rows.
template <class T, int COUNT>
DEVICE RowFragment<T> row_fragment(const Neighbours<T, COUNT>& upper,
                                   const Neighbours<T, COUNT>& lower, int part) {
  constexpr int STEPS = sizeof(T) / 2;
  RowFragment<T> to;
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    const int at = (part * STEPS + step) * 2;
    to.word[4 * step] = upper.word[at];
    to.word[4 * step + 1] = lower.word[at];
    to.word[4 * step + 2] = upper.word[at + 1];
    to.word[4 * step + 3] = lower.word[at + 1];
  }
  return to;
}

template <class T, int COUNT>
DEVICE ColumnFragment<T> column_fragment(const Neighbours<T, COUNT>& column, int part) {
  constexpr int WORDS = sizeof(T);
  ColumnFragment<T> to;
#pragma unroll
  for (int i = 0; i < WORDS; ++i) to.word[i] = column.word[part * WORDS + i];
  return to;
}

// The fragment of four numbers, rounded once.
template <class T>
DEVICE ColumnFragment<T> rounded_column(const float (&value)[4]) {
  ColumnFragment<T> to;
#pragma unroll
  for (int i = 0; i < int(sizeof(T)); ++i) {
    if constexpr (sizeof(T) == 4) {
      to.word[i] = __float_as_uint(value[i]);
    } else {
      to.word[i] = rounded_pair<T>(value[2 * i], value[2 * i + 1]);
    }
  }
  return to;
}

// The halves of two words, side by side: the low ones, or the high ones.
DEVICE uint32 side_by_side(uint32 first, uint32 second, bool high) {
  return __byte_perm(first, second, high ? 0x7632 : 0x5410);
}

// Volatile: all lanes take part, so that it may not be moved into a branch that needs its result.
DEVICE void mma(float (&sum)[4], const uint32* a, const uint32* b, bf16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DEVICE void mma(float (&sum)[4], const uint32* a, const uint32* b, fp16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DEVICE void mma(float (&sum)[4], const uint32* a, const uint32* b, float) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The same product in fp32. The lanes of a quad show each other their numbers of two rows, and to
// the lanes of other rows those of a column.
DEVICE void multiply_exactly(float (&sum)[4], const RowFragment<float>& a,
                             const ColumnFragment<float>& b) {
  const int g = (threadIdx.x & 31) >> 2, c = threadIdx.x & 3;
  // A sum of its own, whose rounding is that of sixteen terms and not of all so far.
  float part[4] = {};
#pragma unroll 1
  for (int from = 0; from < 4; ++from) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      // Numbers 2k and 2k+1 of a row fragment are of rows g and g+8.
      float rows[2], columns[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        rows[i] = __shfl_sync(0xFFFFFFFFu, from_bits(a.word[2 * k + i]), 4 * g + from);
        columns[i] = __shfl_sync(0xFFFFFFFFu, from_bits(b.word[k]), 4 * (2 * c + i) + from);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) part[i] = fmaf(rows[i / 2], columns[i % 2], part[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) sum[i] += part[i];
}

// sum += a·b over the sixteen numbers that the lanes of a quad hold.
template <bool EXACT = EXACT_FP32, class T>
DEVICE void multiply(float (&sum)[4], const RowFragment<T>& a, const ColumnFragment<T>& b) {
  if constexpr (sizeof(T) == 2) {
    mma(sum, a.word, b.word, T());
  } else if constexpr (EXACT) {
    multiply_exactly(sum, a, b);
  } else {
    mma(sum, a.word, b.word, T());
    mma(sum, a.word + 4, b.word + 2, T());
  }
}

// The sums of all warps of a block, in the first one, added in a fixed order. buffer: WARPS/2·COUNT
// ·32 numbers of shared memory.
template <int WARPS, int COUNT>
DEVICE void add_over_warps(float (&sum)[COUNT], float* buffer) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll
  for (int half = WARPS / 2; half; half /= 2) {
    if (warp >= half && warp < 2 * half) {
#pragma unroll
      for (int i = 0; i < COUNT; ++i) buffer[((warp - half) * COUNT + i) * 32 + lane] = sum[i];
    }
    __syncthreads();
    if (warp < half) {
#pragma unroll
      for (int i = 0; i < COUNT; ++i) sum[i] += buffer[(warp * COUNT + i) * 32 + lane];
    }
    __syncthreads();
  }
}

}  // namespace lorafast
