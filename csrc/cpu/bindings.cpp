// The Python module: the entry points of kernels.h.
#include <pybind11/pybind11.h>

#include "kernels.h"
#include "vector.h"
#include "workspace.h"

namespace py = pybind11;

PYBIND11_MODULE(LORAFAST_MODULE, m) {
  using namespace lorafast;
  using ReleaseGil = py::call_guard<py::gil_scoped_release>;
  m.attr("ISA") = ISA;
  m.def("largest_workspace", &Workspace::largest);
  m.def("project", &entries::project, ReleaseGil());
  m.def("low_rank_add", &entries::low_rank_add, ReleaseGil());
  m.def("grad_project", &entries::grad_project, ReleaseGil());
  m.def("grad_output", &entries::grad_output, ReleaseGil());
  m.def("row_norm", &entries::row_norm, ReleaseGil());
  m.def("drop", &entries::drop, ReleaseGil());
  m.def("scale", &entries::scale, ReleaseGil());
}
