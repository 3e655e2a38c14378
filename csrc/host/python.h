// What C++ asks of Python: the slow ways, which are functions of lorafast/engine/host.py.
#pragma once

#include <Python.h>

#include <string>
#include <vector>

#include "cuda_forms.h"
#include "layer.h"

namespace lorafast::host {

// Other threads of Python run while it lives.
class WithoutGil {
 public:
  WithoutGil() : state(PyEval_SaveThread()) {}
  ~WithoutGil() { PyEval_RestoreThread(state); }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  PyThreadState* state;
};

// The gradients by torch.ops.lorafast.linear_backward, where an observer is active or second
// derivatives are asked for. Takes the GIL.
std::vector<at::Tensor> backward_by_dispatcher(const at::Tensor& dy,
                                               const std::vector<at::Tensor>& saved,
                                               const Options& options,
                                               const std::vector<bool>& needs);

// out = start + a b by panels in fp32: lorafast/engine/half_products.py. start [N] or undefined.
// Takes the GIL.
void add_by_panels(const at::Tensor& start, const at::Tensor& a, const at::Tensor& b,
                   const at::Tensor& out);

// A form, compiled if need be and loaded on a device. Takes the GIL.
cuda::Function load_form(at::Device device, const cuda::Form& form);

// What is said where the y that Keep::output reads has been modified. Takes the GIL.
std::string modified_words(const at::Tensor& weight, const at::Tensor& magnitude);

}  // namespace lorafast::host
