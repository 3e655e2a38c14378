// oneDNN's product with a bias in bf16: the twin of lorafast/runtime/onednn.py.
#pragma once

#include <ATen/core/Tensor.h>

namespace lorafast::host {

// True if oneDNN has such a product for these two tensors, where it has one at all.
bool onednn_serves(const at::Tensor& x, const at::Tensor& weight);

// x Wᵀ + bias.  x [...,K], weight [N,K], bias [N]
at::Tensor onednn_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias);

}  // namespace lorafast::host
