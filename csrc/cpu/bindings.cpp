// The module: kernels.h as Python sees it.
#include <pybind11/pybind11.h>

#include "kernels.h"
#include "vector.h"
#include "workspace.h"

namespace py = pybind11;

PYBIND11_MODULE(LORAFAST_MODULE, m) {
  using namespace lorafast;
  using Free = py::call_guard<py::gil_scoped_release>;
  m.attr("ISA") = ISA;
  m.def("largest_workspace", &Workspace::largest);
  m.def("down", &entries::down, Free());
  m.def("up", &entries::up, Free());
  m.def("outer", &entries::outer, Free());
  m.def("grad_output", &entries::grad_output, Free());
  m.def("row_norm", &entries::row_norm, Free());
  m.def("drop", &entries::drop, Free());
  m.def("scale", &entries::scale, Free());
}
