// The autograd node of a layer's call: the twin of _Linear in lorafast/engine/ops.py.
#pragma once

#include <Python.h>

#include "formula.h"

namespace lorafast::host {

// forward of a call that records no gradient. The GIL is held, and released meanwhile.
Outputs computed(const Backend& backend, const at::Tensor& x, const Tensors& tensors,
                 const Options& options);

// y [...,N] of a call that records gradients, with what backward needs saved.
// loan: from which backward takes the weight again, or null for one that is saved. The GIL is held,
// for hooks on saved tensors.
at::Tensor recorded(const Backend& backend, const at::Tensor& x, const Tensors& tensors,
                    const Options& options, PyObject* loan);

// norm_of, outside of autograd and autocast.
at::Tensor detached_norm(const Backend& backend, const Tensors& tensors, const Options& options);

}  // namespace lorafast::host
