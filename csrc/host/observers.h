// What must see every operation, and plain tensors: the twin of bypasses_dispatcher in
// lorafast/runtime/torch_internals.py.
#pragma once

#include <ATen/core/Tensor.h>

namespace lorafast::host {

// True if a dispatch or function mode, a functorch transform, a trace or a profiler is active.
bool observers_active();

// True for a strided tensor in a CPU's memory with nothing that the dispatcher would do first.
bool is_plain(const at::Tensor& tensor);

}  // namespace lorafast::host
