// What C++ asks of Python: kernels, plans and the slow ways, functions of lorafast/engine/host.py.
#pragma once

#include <Python.h>

#include <string>
#include <utility>
#include <vector>

#include "../cpu/kernels.h"
#include "../launch/cuda_driver.h"
#include "cuda_forms.h"
#include "layer.h"

namespace lorafast::host {

// What configure was given. The references are never released: the module lives as long as Python.
struct Python {
  PyObject* kernels = nullptr;
  PyObject* load_form = nullptr;
  PyObject* plan = nullptr;
  PyObject* backward = nullptr;
  PyObject* modified = nullptr;
  PyObject* panels = nullptr;
  PyObject* compute = nullptr;
  PyObject* tensor_map = nullptr;
  PyObject* give_back = nullptr;
  // The dict behind os.environ, and the variables in it that decide backends.
  PyObject* environ = nullptr;
  PyObject* variables = nullptr;
  // The dict of torch.autograd.forward_ad.
  PyObject* forward_ad = nullptr;
};
extern Python python;

// The words of options, as Python has them.
constexpr const char* KEEPS[] = {"none", "output", "inner", "recompute"};
inline const char* axis_of(const Options& options) { return options.in_axis ? "in" : "out"; }
inline const char* dropout_on_of(const Options& options) {
  return options.on_both ? "both" : "adapter";
}

// This thread may use Python while it lives.
class Gil {
 public:
  Gil() : state(PyGILState_Ensure()) {}
  ~Gil() { PyGILState_Release(state); }
  Gil(const Gil&) = delete;
  Gil& operator=(const Gil&) = delete;

 private:
  PyGILState_STATE state;
};

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

// A weight that a loan of lorafast/engine/weight_buffers.py makes, for as long as this lives. Takes
// the GIL.
class BorrowedWeight {
 public:
  explicit BorrowedWeight(PyObject* loan);
  ~BorrowedWeight();
  BorrowedWeight(const BorrowedWeight&) = delete;
  BorrowedWeight& operator=(const BorrowedWeight&) = delete;

  at::Tensor weight;

 private:
  PyObject* borrowed;
};

// The compiled kernels of the CPU. The GIL is held.
const Kernels* cpu_kernels();

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

// What a primitive of a plan computes in Python, and the recipe of it, null for none; asked: if one
// is wanted. The recipe is an object of Python that the caller owns. Takes the GIL.
std::pair<std::vector<at::Tensor>, PyObject*> computed_by_python(
    long plan, const char* primitive, c10::ArrayRef<const at::Tensor*> operands,
    c10::ArrayRef<double> numbers, bool asked);

// The tensor map of a descriptor, whose tensor begins at an address. Takes the GIL.
launches::TensorMap tensor_map(uint64_t address, PyObject* told);

// What is said where the y that Keep::output reads has been modified. Takes the GIL.
std::string modified_words(const at::Tensor& weight, const at::Tensor& magnitude);

}  // namespace lorafast::host
