// What computes the primitives of a call: the twin of lorafast/engine/backends/__init__.py.
#pragma once

#include <utility>

#include "layer.h"

namespace lorafast::host {

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

// The gain of linear and grad_output: m/norm for a backend that divides, or without a norm the
// magnitude itself; undefined: none. of_sums: the gradients of both are those of Σ dy⊙kept alone,
// with kept = gain⊙z if by_gain, and d_norm is wanted if want_norm.
struct Gain {
  at::Tensor magnitude, norm;
  bool of_sums = false, by_gain = false, want_norm = false;

  bool defined() const { return magnitude.defined(); }
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

// v [M,R] with s, sums in fp32; undefined: not asked for. dot = Σ dy⊙kept [N]. gain, d_magnitude
// and d_norm: what a backend that divides may have made of a Gain.
struct OutputGrads {
  at::Tensor v, dB, d_core, d_out_scale, d_bias, dot, gain, d_magnitude, d_norm;
};

// One lives as long as Python: a node refers to the backend that its forward took.
class Backend {
 public:
  Backend() = default;
  virtual ~Backend() = default;
  Backend(const Backend&) = delete;
  Backend& operator=(const Backend&) = delete;

  // True if linear and grad_output may get a gain with a norm.
  virtual bool divides() const { return false; }

  // h = drop(x) Aᵀ and h' = core(h).  x [...,K], A [R,K], core [R,R], [R] or undefined
  virtual std::pair<at::Tensor, at::Tensor> project(const at::Tensor& x, const at::Tensor& A,
                                                    const at::Tensor& core, Drop drop) const = 0;

  // y = gain⊙(x Wᵀ + h' (scaling·scale⊙B)ᵀ) + bias, and the sum before the gain if keep_inner.
  virtual std::pair<at::Tensor, at::Tensor> linear(const at::Tensor& x, const at::Tensor& weight,
                                                   const Up& up, const Gain& gain,
                                                   const at::Tensor& bias,
                                                   bool keep_inner) const = 0;

  // x Wᵀ, a fresh tensor that is no view.
  virtual at::Tensor base_product(const at::Tensor& x, const at::Tensor& weight) const = 0;

  virtual OutputGrads grad_output(const at::Tensor& dy, const OutputGradSpec& spec,
                                  const Gain& gain, const at::Tensor& kept,
                                  bool want_bias) const = 0;

  // dx = (gain⊙dy) W + mask⊙(v A).  v [M,R], or undefined for the base's part alone
  virtual at::Tensor grad_input(const at::Tensor& dy, const at::Tensor& weight,
                                const at::Tensor& gain, const at::Tensor& v, const at::Tensor& A,
                                Drop drop) const = 0;

  // dA = vᵀ drop(x), in fp32.
  virtual at::Tensor grad_project(const at::Tensor& x, const at::Tensor& v, Drop drop) const = 0;

  // drop(x), a fresh tensor.
  virtual at::Tensor drop(const at::Tensor& x, Drop drop) const = 0;

  // ‖W + s·BA‖ in fp32, of each row [N], or of each column [K] if not by_row.
  virtual at::Tensor row_norm(const at::Tensor& weight, const at::Tensor& A, const at::Tensor& B,
                              double scaling, bool by_row) const = 0;

  // m/norm in the norm's dtype, 0 where the norm is 0.  [N] or [K]
  virtual at::Tensor gain_of(const at::Tensor& magnitude, const at::Tensor& norm) const = 0;

  // d_m = d_gain/norm, and d_norm = -d_m·gain if wanted. by_gain: d_gain is divided by the gain
  // first. A quotient by 0 is 0.
  virtual std::pair<at::Tensor, at::Tensor> gain_grads(const at::Tensor& d_gain,
                                                       const at::Tensor& gain,
                                                       const at::Tensor& norm, bool by_gain,
                                                       bool want_norm) const = 0;
};

}  // namespace lorafast::host
