// Launches of Triton's compiled kernels, without Python on the way.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

namespace lorafast::host {

// Add the type Launcher to the module. False with an exception set if that fails.
bool add_launcher(PyObject* module);

}  // namespace lorafast::host
