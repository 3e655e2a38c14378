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
  m.def("project", &entries::project, Free());
  m.def("low_rank_add", &entries::low_rank_add, Free());
  m.def("grad_project", &entries::grad_project, Free());
  m.def("grad_output", &entries::grad_output, Free());
  m.def("row_norm", &entries::row_norm, Free());
  m.def("drop", &entries::drop, Free());
  m.def("scale", &entries::scale, Free());
}
