#include "observers.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/macros/Export.h>

#include <memory>

// Declared here, because their headers take longer to compile than all of this folder.
namespace torch::jit::tracer {
struct TracingState;
TORCH_API const std::shared_ptr<TracingState>& getTracingState();
}  // namespace torch::jit::tracer
namespace torch::profiler::impl {
TORCH_API bool profilerEnabled();
}

namespace lorafast::host {
namespace {

using c10::DispatchKey;

// What a plain tensor has at most. Negative, conjugate, batched, sparse, nested, fake, functional
// and wrapped tensors have other keys.
const c10::DispatchKeySet PLAIN_KEYS = c10::DispatchKeySet(
    {DispatchKey::CPU, DispatchKey::AutogradCPU, DispatchKey::AutocastCPU, DispatchKey::CUDA,
     DispatchKey::AutogradCUDA, DispatchKey::AutocastCUDA, DispatchKey::ADInplaceOrView});

}  // namespace

bool observers_active() {
  // A dispatch mode includes PythonTLSSnapshot.
  const auto included = c10::impl::tls_local_dispatch_key_set().included_;
  return included.has(DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         included.has(DispatchKey::FuncTorchDynamicLayerBackMode) ||
         included.has(DispatchKey::PythonTLSSnapshot) || included.has(DispatchKey::Functionalize) ||
         at::impl::PythonTorchFunctionTLS::stack_len() > 0 ||
         torch::jit::tracer::getTracingState() || torch::profiler::impl::profilerEnabled();
}

bool is_plain(const at::Tensor& tensor) {
  return PLAIN_KEYS.has_all(tensor.key_set()) && tensor.has_storage();
}

}  // namespace lorafast::host
