// The dtypes that a call computes in, and where it rounds: lorafast/engine/precision.py.
#pragma once

#include <utility>

#include "layer.h"

namespace lorafast::host {

// The dtype of u and v, the gradients of h' and h, beside an activation of this dtype.
inline at::ScalarType low_rank_grad_dtype(at::ScalarType dtype) {
  return dtype == at::kHalf ? at::kFloat : dtype;
}

// h' = h coreᵀ, or h⊙core for a diagonal, rounded once to h's dtype; h without a core.  h [M,R]
at::Tensor apply_core(const at::Tensor& h, const at::Tensor& core);

// tensor·2ᵏ in fp16 and 2⁻ᵏ [], with the k that brings the largest element near 2¹⁴.
std::pair<at::Tensor, at::Tensor> scaled_to_fp16(const at::Tensor& tensor);

}  // namespace lorafast::host
