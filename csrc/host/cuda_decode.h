// Launches of the CUDA kernel of decode: the twin of lorafast/engine/cuda_decode.py.
#pragma once

#include "backend.h"
#include "cuda_forms.h"

namespace lorafast::host::cuda {

// True if decode computes y.  x2 [M,K], weight [N,K]
bool decode_serves(const at::Tensor& x2, const at::Tensor& weight, const Up& up);

// y = gain⊙(x Wᵀ + h' (s·scale⊙B)ᵀ) + bias in place; inner receives what gain is applied to.  y2,
// inner [M,N] dense
void decode(const Device& device, const at::Tensor& y2, const at::Tensor& x2,
            const at::Tensor& weight, const Up& up, const Gain& gain, const at::Tensor& bias,
            const at::Tensor& inner);

}  // namespace lorafast::host::cuda
