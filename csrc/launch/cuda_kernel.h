// A compiled kernel of csrc/cuda, as a function of Python.
#pragma once

#include <Python.h>

namespace lorafast::launches {

// Add the type CudaKernel to the module. False with an exception set if that fails.
bool add_cuda_kernel(PyObject* made);

}  // namespace lorafast::launches
