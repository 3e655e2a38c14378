// What Python calls: addresses, sizes and strides (in elements) in, nothing out.
//
// type and F_type: Type's numbers. F: a factor [R, length] of any strides, F_R and F_l apart. An address of 0 is what is not asked
// for, or not there. t = 0: nothing drops. The arguments have been checked by lorafast/engine/backends/cpu.py.
#pragma once

#include "types.h"

namespace lorafast::entries {

// mixed: h by a core [R,R], whose strides along mixed's and h's ranks are core_R and core_l.
void project(int type, Address x, int64_t M, int64_t K, int64_t x_stride, int64_t R, Address F, int F_type, int64_t F_R, int64_t F_l,
          Address seed, uint32_t t, Address h, Address core, int core_type, int64_t core_R, int64_t core_l, Address mixed,
          int threads);

// out comes last: the product that makes it may run when all the rest has been made.
void low_rank_add(int type, Address h, int64_t M, int64_t h_stride, int64_t N, int64_t R, Address F, int F_type, int64_t F_R, int64_t F_l,
        float s, Address scale, Address seed, uint32_t t, Address gain, Address bias, Address inner, int threads, Address out);

void grad_project(int type, Address x, int64_t M, int64_t K, int64_t x_stride, Address v, int64_t R, int64_t v_stride, Address seed,
           uint32_t t, Address out, int threads);

// live: how many of mixed's and P's R columns, the last ones, are asked for.
void grad_output(int type, Address dy, int64_t M, int64_t N, int64_t dy_stride, int64_t R, Address F, int F_type, int64_t F_R,
                 int64_t F_l, float s, Address gain, Address scale, Address u, Address mixed, int64_t mixed_stride, int64_t live,
                 Address P, Address d_bias, Address kept, int64_t kept_stride, Address dot, int threads);

// Whether out was written: not where a factor is all zeros.
bool row_norm(int type, Address weight, int64_t N, int64_t K, int64_t weight_stride, int64_t R, Address A, int A_type, int64_t A_R,
              int64_t A_l, Address B, int B_type, int64_t B_R, int64_t B_l, float s, bool by_row, Address out, int threads);

void scale(int type, Address x, int64_t rows, int64_t columns, int64_t x_stride, Address gain, bool by_row, Address out,
           int threads);

void drop(int type, Address x, int64_t rows, int64_t columns, int64_t x_stride, Address seed, uint32_t t, int64_t m0, Address out,
          int threads);

}  // namespace lorafast::entries
