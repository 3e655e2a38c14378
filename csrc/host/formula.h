// The layer's formula and its gradients: the twin of lorafast/engine/formula.py.
//
// z = (in_gain⊙x) Wᵀ + s·out_scale⊙(core(drop(in_gain⊙x) Aᵀ) Bᵀ)        y = gain⊙z + bias
// gain = magnitude/norm, of the columns of W (in_gain) with Options::in_axis
#pragma once

#include "backend.h"

namespace lorafast::host {

// The activations that backward needs for these gradients.
struct Saved {
  bool x, h, y, z;
};

Outputs forward(const Backend& backend, const at::Tensor& x, const Tensors& tensors,
                const Options& options);

// The gradients that are needed, in their tensors' dtypes; the others are undefined. kept is y or
// z.
Grads backward(const Backend& backend, const at::Tensor& dy, const at::Tensor& x,
               const at::Tensor& h, const at::Tensor& kept, const Tensors& tensors,
               const Options& options, const Needs& needs);

// ‖W + s·(out_scale⊙B)·core·A‖ of each row [N], or of each column [K] with Options::in_axis.
at::Tensor norm_of(const Backend& backend, const Tensors& tensors, const Options& options);

Saved saved_for(const Needs& needs, const Options& options, bool has_gain);

}  // namespace lorafast::host
