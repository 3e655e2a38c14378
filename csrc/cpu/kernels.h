// The entry points that Python calls. Arguments are addresses, sizes, and strides in elements;
// results are written to the output addresses.
//
// type and F_type are values of Type. F is a factor [R, length] of any strides: F_R elements
// between ranks, F_l along the length. An address of 0 stands for an absent operand or an output
// that is not requested. threshold = 0 means no dropout. lorafast/engine/backends/cpu.py checks the
// arguments.
#pragma once

#include "types.h"

namespace lorafast::entries {

// h = drop(x) Fᵀ, and h_core = h coreᵀ if h_core is given. core is [R,R], with strides core_R
// between its rows (ranks of h_core) and core_l along them (ranks of h).
void project(int type, Address x, int64_t M, int64_t K, int64_t x_stride, int64_t R, Address F,
             int F_type, int64_t F_R, int64_t F_l, Address seed, uint32_t threshold, Address h,
             Address core, int core_type, int64_t core_R, int64_t core_l, Address h_core,
             int threads);

// out = gain⊙(out + mask⊙(h (s·scale⊙F))) + bias, in place; inner receives the sum before the gain.
// out comes last so that a caller can prepare the other arguments before it makes out by a product.
// h_type is type, or fp32 beside fp16.
void low_rank_add(int type, int h_type, Address h, int64_t M, int64_t h_stride, int64_t N,
                  int64_t R, Address F, int F_type, int64_t F_R, int64_t F_l, float s,
                  Address scale, Address seed, uint32_t threshold, Address gain, Address bias,
                  Address inner, int threads, Address out);

// out = vᵀ drop(x), in fp32. v is fp32 for an fp16 x.
void grad_project(int type, Address x, int64_t M, int64_t K, int64_t x_stride, Address v, int64_t R,
                  int64_t v_stride, Address seed, uint32_t threshold, Address out, int threads);

// u = dy (s·gain⊙scale⊙F)ᵀ, fp32 for an fp16 dy, P = s·gain⊙(dyᵀ h_core), d_bias = Σ dy, dot = Σ
// dy⊙kept. Only the last `live` of the R columns of h_core and P are computed.
void grad_output(int type, Address dy, int64_t M, int64_t N, int64_t dy_stride, int64_t R,
                 Address F, int F_type, int64_t F_R, int64_t F_l, float s, Address gain,
                 Address scale, Address u, Address h_core, int64_t h_core_stride, int64_t live,
                 Address P, Address d_bias, Address kept, int64_t kept_stride, Address dot,
                 int threads);

// out = ‖weight + s·BA‖ along rows or columns. Returns false, with out not written, if a factor is
// all zeros.
bool row_norm(int type, Address weight, int64_t N, int64_t K, int64_t weight_stride, int64_t R,
              Address A, int A_type, int64_t A_R, int64_t A_l, Address B, int B_type, int64_t B_R,
              int64_t B_l, float s, bool by_row, Address out, int threads);

// out = gain⊙(x Wᵀ + h (s·scale⊙F)) + bias of few tokens, in one pass over W, whose
// rows are dense. inner receives the sum before the gain. R may be 0, and h and F absent. Returns
// false, with out not written, if R is not 0 and h F is.
bool linear(int type, Address x, int64_t M, int64_t K, int64_t x_stride, Address weight, int64_t N,
            int64_t weight_stride, Address h, int64_t h_stride, int64_t R, Address F, int F_type,
            int64_t F_R, int64_t F_l, float s, Address scale, Address gain, Address bias,
            Address inner, int threads, Address out);

// The grouped entry points are those of the same names for an activation whose rows are sorted by
// expert: those of expert e are offsets[e] .. offsets[e + 1], int32 [experts + 1]. Factors, gains
// and results of an expert have its index as their first: F_e and core_e are the elements from one
// expert's factor to the next one's, 0 for a factor that all share; gain, scale, bias, d_bias and
// dot are [experts,N], P [experts,N,R], and the out of grouped_grad_project [experts,R,K]. rows, if
// given, are the indices that the rows have for dropout, int64.
void grouped_project(int type, Address x, int64_t K, int64_t x_stride, int64_t R, Address F,
                     int F_type, int64_t F_e, int64_t F_R, int64_t F_l, Address seed,
                     uint32_t threshold, Address h, Address core, int core_type, int64_t core_e,
                     int64_t core_R, int64_t core_l, Address h_core, Address offsets,
                     int64_t experts, Address rows, int threads);

void grouped_low_rank_add(int type, int h_type, Address h, int64_t h_stride, int64_t N, int64_t R,
                          Address F, int F_type, int64_t F_e, int64_t F_R, int64_t F_l, float s,
                          Address scale, Address seed, uint32_t threshold, Address gain,
                          Address bias, Address inner, Address out, Address offsets,
                          int64_t experts, Address rows, int threads);

void grouped_grad_project(int type, Address x, int64_t K, int64_t x_stride, Address v, int64_t R,
                          int64_t v_stride, Address seed, uint32_t threshold, Address out,
                          Address offsets, int64_t experts, Address rows, int threads);

void grouped_grad_output(int type, Address dy, int64_t N, int64_t dy_stride, int64_t R, Address F,
                         int F_type, int64_t F_e, int64_t F_R, int64_t F_l, float s, Address gain,
                         Address scale, Address u, Address h_core, int64_t h_core_stride,
                         int64_t live, Address P, Address d_bias, Address kept, int64_t kept_stride,
                         Address dot, Address offsets, int64_t experts, int threads);

// out = gain⊙x, with one gain per row (by_row) or per column.
void scale(int type, Address x, int64_t rows, int64_t columns, int64_t x_stride, Address gain,
           bool by_row, Address out, int threads);

// out = drop(x), where x holds rows m0, m0 + 1, … of an activation.
void drop(int type, Address x, int64_t rows, int64_t columns, int64_t x_stride, Address seed,
          uint32_t threshold, int64_t m0, Address out, int threads);

// out [rows, columns] = 1 byte for every element of an activation: 1 if drop drops it, else 0.
void drop_mask(int64_t rows, int64_t columns, Address seed, uint32_t threshold, Address out);

// out [count] = code[index]·absmax[block] of the numbers first, first + 1, … of a weight in 4 bits.
// packed holds two indices in a byte, the high half first; absmax [blocks] and code [16] are fp32,
// and each product is rounded once, to type.
void dequantise_4bit(int type, Address packed, Address absmax, Address code, int64_t blocksize,
                     int64_t first, int64_t count, Address out, int threads);

}  // namespace lorafast::entries

namespace lorafast {

// The entry points for C++ of another module: csrc/host gets them as a capsule of this name.
struct Kernels {
  static constexpr const char* NAME = "lorafast.Kernels";

  decltype(&entries::project) project;
  decltype(&entries::low_rank_add) low_rank_add;
  decltype(&entries::grad_project) grad_project;
  decltype(&entries::grad_output) grad_output;
  decltype(&entries::row_norm) row_norm;
  decltype(&entries::linear) linear;
  decltype(&entries::scale) scale;
  decltype(&entries::drop) drop;
};

}  // namespace lorafast
