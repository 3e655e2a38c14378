// The primitives of the `cpu` backend: the twins of the functions of
// lorafast/engine/backends/cpu.py, operation by operation, so that both give the same bits.
#pragma once

#include <optional>
#include <utility>
#include <vector>

#include "../cpu/kernels.h"
#include "layer.h"

namespace lorafast::host {

// What executes the calls of a problem, as lorafast/engine/host.py decides it: flags of a plan.
enum Plan : long {
  PYTHON = 0,       // the Python path serves
  SERVED = 1,       // the C++ kernels serve all primitives
  ONEDNN_BIAS = 2,  // oneDNN has a bf16 product with a bias
  Y_ALONG = 4,      // x Wᵀ goes by panels in fp32 if the numbers summed lie side by side in W,
  Y_ACROSS = 8,     // or if they do not
  DX_ALONG = 16,    // so does dy W
  DX_ACROSS = 32,
};

// The compiled kernels that the primitives call, and the plan of the problem.
struct Backend {
  const Kernels* kernels = nullptr;
  long plan = 0;
};

// The dropout of one call; a threshold of 0 means none.
struct Drop {
  const at::Tensor& seed;
  uint32_t threshold = 0;
};

// One summand h (scaling·scale⊙B)ᵀ of y.  h [M,R], B [N,R], scale [N] or undefined
struct Up {
  const at::Tensor& h;
  const at::Tensor& B;
  double scaling = 1;
  const at::Tensor& scale;
};

// What grad_output is asked for.  h [M,R] is the saved one, before the core.
struct OutputGradSpec {
  const at::Tensor& B;
  double scaling = 1;
  const at::Tensor& out_scale;
  const at::Tensor& core;
  const at::Tensor& h;
  int64_t frozen_columns = 0;
  bool want_v = true;
  bool want_B = false;
  bool want_core = false;
  bool want_out_scale = false;
};

// v [M,R] with s, sums in fp32; undefined: not asked for. dot = Σ dy⊙kept [N].
struct OutputGrads {
  at::Tensor v, dB, d_core, d_out_scale, d_bias, dot;
};

// h = drop(x) Aᵀ and h' = core(h).  x [...,K], A [R,K], core [R,R], [R] or undefined
std::pair<at::Tensor, at::Tensor> project(const Backend& backend, const at::Tensor& x,
                                          const at::Tensor& A, const at::Tensor& core, Drop drop);

// y = gain⊙(x Wᵀ + h' (scaling·scale⊙B)ᵀ) + bias, and the sum before the gain if keep_inner.
std::pair<at::Tensor, at::Tensor> linear(const Backend& backend, const at::Tensor& x,
                                         const at::Tensor& weight, const Up& up,
                                         const at::Tensor& gain, const at::Tensor& bias,
                                         bool keep_inner);

// x Wᵀ + bias, a fresh tensor that is no view.  bias [N] of x's dtype, or undefined
at::Tensor base_product(const Backend& backend, const at::Tensor& x, const at::Tensor& weight,
                        const at::Tensor& bias);

OutputGrads grad_output(const Backend& backend, const at::Tensor& dy, const OutputGradSpec& spec,
                        const at::Tensor& gain, const at::Tensor& kept, bool want_bias);

// dx = (gain⊙dy) W + mask⊙(v A).  v [M,R], or undefined for the base's part alone
at::Tensor grad_input(const Backend& backend, const at::Tensor& dy, const at::Tensor& weight,
                      const at::Tensor& gain, const at::Tensor& v, const at::Tensor& A, Drop drop);

// dA = vᵀ drop(x), in fp32.
at::Tensor grad_project(const Backend& backend, const at::Tensor& x, const at::Tensor& v,
                        Drop drop);

// drop(x), a fresh tensor.
at::Tensor drop(const Backend& backend, const at::Tensor& x, Drop drop);

// ‖W + s·BA‖ in fp32, of each row [N], or of each column [K] if not by_row.
at::Tensor row_norm(const Backend& backend, const at::Tensor& weight, const at::Tensor& A,
                    const at::Tensor& B, double scaling, bool by_row);

// a/b, 0 where b is 0.
at::Tensor divide_or_zero(const at::Tensor& a, const at::Tensor& b);

// h' = h coreᵀ, or h⊙core for a diagonal.  h [M,R]
at::Tensor apply_core(const Backend& backend, const at::Tensor& h, const at::Tensor& core);

}  // namespace lorafast::host
