// What Python calls, one pair for each kernel: addresses, sizes and strides (in elements) in, and how many floats of work it needs.
//
// type and F_type: Type's numbers. An address of 0 is what is not asked for, or not there. t = 0: nothing drops. The arguments have
// been checked by lorafast/backends/cpu.py.
#pragma once

#include <cstdint>

#include "types.h"

namespace lorafast::entries {

void down(int type, Address x, int64_t M, int64_t K, int64_t stride, Address F, int F_type, int64_t R, int64_t F_R, int64_t F_K,
          Address seed, uint32_t t, Address h, Address work, int threads);
int64_t down_workspace(int type, int64_t K, int64_t R);

void up(int type, Address h, int64_t M, int64_t h_stride, Address F, int F_type, int64_t R, int64_t F_R, int64_t F_N, int64_t N,
        float s, Address scale, Address seed, uint32_t t, Address gain, Address bias, Address inner, Address out, Address work,
        int threads);
int64_t up_workspace(int64_t N, int64_t R);

void outer(int type, Address x, int64_t M, int64_t K, int64_t stride, Address v, int64_t R, int64_t v_stride, Address seed,
           uint32_t t, Address out, Address work, int threads);
int64_t outer_workspace(int type, int64_t M, int64_t K, int64_t R);

void grad_output(int type, Address dy, int64_t M, int64_t N, int64_t stride, Address F, int F_type, int64_t R, int64_t F_R,
                 int64_t F_N, float s, Address gain, Address scale, Address u, Address mixed, int64_t P_rank, int64_t mixed_stride,
                 Address P, int64_t P_stride, Address d_bias, Address kept, int64_t kept_stride, Address dot, Address work,
                 int threads);
int64_t grad_output_workspace(int type, int64_t M, int64_t N, int64_t R, int64_t sums);

void row_norm(int type, Address weight, int64_t N, int64_t K, int64_t stride, Address A, int A_type, int64_t R, int64_t A_R,
              int64_t A_K, Address B, int B_type, int64_t, int64_t B_R, int64_t B_N, float s, bool by_row, Address out,
              Address work, int threads);
int64_t row_norm_workspace(int64_t N, int64_t K, int64_t R, bool by_row);

void scale(int type, Address x, int64_t rows, int64_t columns, int64_t stride, Address gain, bool by_row, Address out, int threads);

void drop(int type, Address x, int64_t rows, int64_t columns, int64_t stride, Address seed, uint32_t t, int64_t m0, Address out,
          int threads);

}  // namespace lorafast::entries
