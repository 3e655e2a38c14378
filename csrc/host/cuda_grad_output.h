// Launches of the CUDA kernels of grad_output: the twin of lorafast/engine/cuda_grad_output.py.
#pragma once

#include "backend.h"
#include "cuda_forms.h"

namespace lorafast::host::cuda {

// The gradients of an adapter, and the sums of dy that are asked for.  dy2, kept2 [M,N]
OutputGrads grads_of(const Device& device, const at::Tensor& dy2, const OutputGradSpec& spec,
                     const Gain& gain, const at::Tensor& kept2, bool want_bias);

}  // namespace lorafast::host::cuda
