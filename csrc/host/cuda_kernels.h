// Launches of the CUDA kernels in csrc/cuda: the twin of lorafast/engine/cuda_kernels.py, launch by
// launch, with the same operands, forms and grids.
#pragma once

#include <utility>

#include "backend.h"
#include "cuda_forms.h"

namespace lorafast::host::cuda {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t up_to(int64_t n, int64_t multiple) { return ceil_div(n, multiple) * multiple; }
inline int32_t i32(int64_t value) { return static_cast<int32_t>(value); }

// The tiles of eight ranks of a form; 16 of them are a block of several.
int tiles_of(int64_t R);

// True if rows are dense, 16 bytes aligned, and a multiple of eight numbers long.
bool is_aligned(const at::Tensor& matrix);

// The matrix [M, width] of an activation: flatten_tokens of lorafast/engine/row_blocks.py.
at::Tensor flatten_tokens(const at::Tensor& x);

// An uninitialised tensor beside another.
at::Tensor empty(const at::Tensor& like, at::IntArrayRef sizes, at::ScalarType dtype);

// Blocks of threads that keep a multiprocessor busy, and more of them where each has less on its
// way.
constexpr int64_t BLOCKS = 2, MORE_BLOCKS = 3;

// A sum in `parts` parts of `steps` steps each; the last may have fewer.
struct Split {
  int64_t parts, steps;
};
// busy: the blocks that keep a multiprocessor busy.
Split split(const Device& device, int64_t blocks, int64_t steps, int64_t busy = BLOCKS);

// The Philox calls of a row, the threshold in both halves of a word, and the scale.
struct Masks {
  int64_t groups;
  uint32_t threshold;
  float factor;
};
Masks masks_of(int64_t K, const Drop& drop);

// The number of a small operand's dtype, 0 for none.
inline int32_t number_of(const at::Tensor& t) {
  return t.defined() ? dtype_number(t.scalar_type()) : 0;
}

// The strides of a core, the same twice for a diagonal, 0 for none.
inline std::pair<int64_t, int64_t> core_strides(const at::Tensor& core) {
  if (!core.defined()) return {0, 0};
  return {core.stride(0), core.stride(-1)};
}
inline int32_t core_dims(const at::Tensor& core) { return core.defined() ? i32(core.dim()) : 0; }

// A small operand in a dtype that kernels read; a vector dense.
at::Tensor small(const at::Tensor& t);

// What scale makes of a matrix beside its dtype. rows, width: of the result, -1 for its own.
struct Scaled {
  int64_t rows = -1, width = -1;
  double scaling = 1;
  const at::Tensor& row_scale;
  const at::Tensor& column_scale;
  bool tf32 = false;
};

// s·row_scale⊙F·column_scale [rows,width] in dtype, padded with zeros.
at::Tensor scale(const Device& device, const at::Tensor& F, at::ScalarType dtype, Scaled how);

// out = drop(x).  out, x2 [M,K]
void drop_into(const Device& device, const at::Tensor& out, const at::Tensor& x2, const Drop& drop);

// h = drop(x) Aᵀ and h' = core(h) in dtype.  x2 [M,K] -> [M,R]
std::pair<at::Tensor, at::Tensor> project(const Device& device, const at::Tensor& x2,
                                          const at::Tensor& A, const at::Tensor& core,
                                          const Drop& drop, at::ScalarType dtype);

// h = factor·Σ parts in dtype, and h' = core(h).  parts [splits,M,R]
std::pair<at::Tensor, at::Tensor> finish(const Device& device, const at::Tensor& parts,
                                         const at::Tensor& core, float factor,
                                         at::ScalarType dtype);

// factor times the sum of parts [splits,·], or its root.
at::Tensor sum_parts(const Device& device, const at::Tensor& parts, float factor = 1,
                     bool root = false);

// (a/first)/second, 0 where a divisor is 0, in fp32, and it times -factor; undefined: none. vectors
std::pair<at::Tensor, at::Tensor> quotient(const Device& device, const at::Tensor& a,
                                           const at::Tensor& first, const at::Tensor& second,
                                           const at::Tensor& factor);

// m and the norm of a gain as kernels read them: small vectors, the norm in fp32.
std::pair<at::Tensor, at::Tensor> gain_operands(const Gain& gain);

// m/norm, by a launch of its own.
at::Tensor gain_tensor(const Device& device, const Gain& gain);

// vᵀ drop(x) in fp32.  v [M,R] -> [R,K]
at::Tensor grad_project(const Device& device, const at::Tensor& x2, const at::Tensor& v,
                        const Drop& drop);

// v [M,·] in dtype, with the ranks that a lane reads side by side, padded with zeros.
at::Tensor token_factor(const Device& device, const at::Tensor& v, at::ScalarType dtype, int tiles);

// One low_rank_add.  h [M,R], factor [N,R]; undefined: absent
struct Addition {
  const at::Tensor& h;
  const at::Tensor& factor;
  Drop drop;
  bool accumulate = true;
  double scaling = 1;
  const at::Tensor& row_scale;
  const Gain& gain;
  const at::Tensor& bias;
  const at::Tensor& inner;
};

// out = gain⊙((out if accumulate) + mask⊙(h (s·row_scale⊙factor)ᵀ)) + bias in place.  out [M,N]
// dense
void low_rank_add(const Device& device, const at::Tensor& out, const Addition& addition);

// ‖W + sBA‖ in fp32, per row or per column.
at::Tensor row_norm(const Device& device, const at::Tensor& weight, const at::Tensor& A,
                    const at::Tensor& B, double scaling, bool by_row);

}  // namespace lorafast::host::cuda
