// The arguments of a layer's call, as lorafast/engine/problem.py has them.
//
// Sizes: M tokens, K in_features, N out_features, R rank. x [...,K], weight [N,K], A [R,K], B
// [N,R].
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>

namespace lorafast::host {

// LayerTensors. A tensor that is not given is undefined.
struct Tensors {
  at::Tensor weight, bias, A, B, core, magnitude, norm, out_scale, lora_bias, seed, scale;
};

// The activation kept for the gradient of the magnitude.
enum class Keep : int { none, output, inner, recompute };

// CallOptions. in_axis: axis="in", the magnitude scales the columns of W; on_both:
// dropout_on="both", DoRA's correction of the base term reads the dropped input too.
struct Options {
  double scaling = 1;
  double dropout = 0;
  bool in_axis = false;
  bool on_both = false;
  Keep keep = Keep::none;
  int64_t frozen_columns = 0;

  bool drops_base() const { return dropout > 0 && on_both; }
};

// The gradients of a call in GradMask's order.
enum Grad : int {
  X,
  BIAS,
  LORA_A,
  LORA_B,
  CORE,
  MAGNITUDE,
  NORM,
  OUT_SCALE,
  LORA_BIAS,
  GRADS,
};

using Needs = std::array<bool, GRADS>;
using Grads = std::array<at::Tensor, GRADS>;

inline bool needs_gain(const Needs& needs) { return needs[MAGNITUDE] || needs[NORM]; }

// What forward makes: y [...,N], h [M,R], and z [M,N] for Keep::inner.
struct Outputs {
  at::Tensor y, h, z;
};

// M, the product of all sizes but the last.
inline int64_t tokens(const at::Tensor& x) {
  int64_t M = 1;
  for (const int64_t size : x.sizes().slice(0, x.dim() - 1)) M *= size;
  return M;
}

// The dtype that sums run in.
inline at::ScalarType accumulator(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

// The tensor in the dtype. One that has it already does not go through the dispatcher.
inline at::Tensor cast(const at::Tensor& tensor, at::ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : tensor.to(dtype);
}

}  // namespace lorafast::host
