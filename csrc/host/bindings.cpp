// The Python module: linear, one call from a layer's arguments, or from a layer of PEFT, to its
// output; and configure.
#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/randint.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cmath>
#include <map>
#include <stdexcept>

#include "../cpu/module_name.h"
#include "cpu_backend.h"
#include "cuda_backend.h"
#include "node.h"
#include "observers.h"
#include "peft_layer.h"
#include "plans.h"
#include "python.h"
#include "recipe_backend.h"

namespace lorafast::host {
namespace {

using at::Tensor;

Plans plans;
// By device and plan. They are never deleted: nodes refer to them.
std::map<std::pair<std::string, long>, const Backend*> backends;
// The values of the variables that the plans were made under; null: not set.
std::array<PyObject*, 2> planned_under{};
// How often the plans have been forgotten.
int64_t forgotten = 0;

// The arguments of linear, in order.
enum Argument : int {
  GIVEN_X,
  GIVEN_WEIGHT,
  GIVEN_BIAS,
  GIVEN_A,
  GIVEN_B,
  GIVEN_CORE,
  GIVEN_MAGNITUDE,
  GIVEN_NORM,
  GIVEN_OUT_SCALE,
  GIVEN_LORA_BIAS,
  GIVEN_SEED,
  GIVEN_SCALING,
  GIVEN_DROPOUT,
  GIVEN_AXIS,
  GIVEN_DROPOUT_ON,
  GIVEN_KEEP,
  GIVEN_FROZEN_COLUMNS,
  COMPUTES_NORM,
  ARGUMENTS,
};

// The tensor of an argument, undefined for None. False for everything but a torch.Tensor and a
// Parameter that are plain.
bool read(PyObject* object, Tensor& tensor) {
  if (object == Py_None) return true;
  if (reinterpret_cast<PyObject*>(Py_TYPE(object)) != THPVariableClass &&
      reinterpret_cast<PyObject*>(Py_TYPE(object)) != ParameterClass)
    return false;
  tensor = THPVariable_Unpack(object);
  return is_plain(tensor);
}

bool equals(PyObject* object, const char* word) {
  return PyUnicode_Check(object) && PyUnicode_CompareWithASCIIString(object, word) == 0;
}

bool is_float(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf ||
         dtype == at::kDouble;
}

bool is_vector(const Tensor& tensor, int64_t length) {
  return !tensor.defined() ||
         (tensor.dim() == 1 && tensor.size(0) == length && is_float(tensor.scalar_type()));
}

bool is_matrix(const Tensor& tensor, int64_t rows, int64_t columns) {
  return tensor.defined() && tensor.dim() == 2 && tensor.size(0) == rows &&
         tensor.size(1) == columns && is_float(tensor.scalar_type());
}

// True if the shapes, dtypes and devices are those of a usual call; what is wrong is said by
// Python's checks.
bool fits(const Tensor& x, const Tensors& t, bool in_axis) {
  if (!x.defined() || !t.weight.defined() || !t.A.defined() || t.weight.dim() != 2 ||
      t.A.dim() != 2 || x.dim() == 0)
    return false;
  const int64_t N = t.weight.size(0), K = t.weight.size(1), R = t.A.size(0);
  const bool core = !t.core.defined() || is_matrix(t.core, R, R) || is_vector(t.core, R);
  const bool seed = !t.seed.defined() ||
                    (t.seed.scalar_type() == at::kLong && t.seed.dim() == 1 && t.seed.size(0) == 1);
  const bool norm = !t.norm.defined() || t.magnitude.defined();
  const int64_t gains = in_axis ? K : N;
  for (const Tensor* tensor : {&t.weight, &t.bias, &t.A, &t.B, &t.core, &t.magnitude, &t.norm,
                               &t.out_scale, &t.lora_bias, &t.seed})
    if (tensor->defined() && tensor->device() != x.device()) return false;
  return is_float(x.scalar_type()) && is_float(t.weight.scalar_type()) && x.size(-1) == K &&
         K > 0 && N > 0 && R > 0 && is_matrix(t.A, R, K) && is_matrix(t.B, N, R) && core && seed &&
         norm && is_vector(t.bias, N) && is_vector(t.magnitude, gains) &&
         is_vector(t.norm, gains) && is_vector(t.out_scale, N) && is_vector(t.lora_bias, N);
}

// The numbers and words of a usual call. keep: the word's number, -1 for "auto".
bool read_options(PyObject* const* given, Options& options, int& keep) {
  if (!PyFloat_CheckExact(given[GIVEN_SCALING]) || !PyLong_CheckExact(given[GIVEN_FROZEN_COLUMNS]))
    return false;
  options.scaling = PyFloat_AS_DOUBLE(given[GIVEN_SCALING]);
  options.frozen_columns = PyLong_AsLongLong(given[GIVEN_FROZEN_COLUMNS]);
  if (PyFloat_CheckExact(given[GIVEN_DROPOUT]))
    options.dropout = PyFloat_AS_DOUBLE(given[GIVEN_DROPOUT]);
  else if (PyLong_CheckExact(given[GIVEN_DROPOUT]))
    options.dropout = PyLong_AsDouble(given[GIVEN_DROPOUT]);
  else
    return false;
  if (PyErr_Occurred()) {
    PyErr_Clear();
    return false;
  }
  const double steps = std::nearbyint(options.dropout * 65536);
  const bool drops = options.dropout == 0 || (steps > 0 && steps < 65536);
  if (!std::isfinite(options.scaling) || !drops || options.frozen_columns < 0) return false;
  keep = -2;
  if (equals(given[GIVEN_KEEP], "auto")) keep = -1;
  for (int i = 1; i < 4; ++i)
    if (keep == -2 && equals(given[GIVEN_KEEP], KEEPS[i])) keep = i;
  options.in_axis = equals(given[GIVEN_AXIS], "in");
  options.on_both = equals(given[GIVEN_DROPOUT_ON], "both");
  const bool words = (options.in_axis || equals(given[GIVEN_AXIS], "out")) &&
                     (options.on_both || equals(given[GIVEN_DROPOUT_ON], "adapter"));
  const bool agree = !(options.on_both && keep == static_cast<int>(Keep::output)) &&
                     (!options.in_axis || keep == -1 || keep == static_cast<int>(Keep::recompute));
  return keep > -2 && words && agree;
}

// The activation kept for d_magnitude: resolve_keep of lorafast/engine/formula.py.
Keep resolved(int keep, const Options& options, bool trains_gain, bool has_bias,
              at::ScalarType dtype) {
  if (!trains_gain || options.in_axis) return Keep::none;
  if (keep >= 0) return static_cast<Keep>(keep);
  const bool exact =
      !has_bias && !options.drops_base() && (dtype == at::kBFloat16 || dtype == at::kFloat);
  return exact ? Keep::output : Keep::inner;
}

bool requires_grad(const Tensor& tensor) { return tensor.defined() && tensor.requires_grad(); }

bool any_requires_grad(const Tensor& x, const Tensors& t) {
  return requires_grad(x) || requires_grad(t.A) || requires_grad(t.B) || requires_grad(t.bias) ||
         requires_grad(t.core) || requires_grad(t.magnitude) || requires_grad(t.norm) ||
         requires_grad(t.out_scale) || requires_grad(t.lora_bias);
}

bool forward_ad_active() {
  static PyObject* const name = PyUnicode_InternFromString("_current_level");
  PyObject* level = PyDict_GetItemWithError(python.forward_ad, name);
  return !level || PyLong_AsLong(level) >= 0;
}

// Forget all plans if a variable that decides backends has another value than when they were made.
void follow_variables() {
  for (Py_ssize_t i = 0; i < 2; ++i) {
    PyObject* value =
        PyDict_GetItemWithError(python.environ, PyTuple_GET_ITEM(python.variables, i));
    if (value == planned_under[i]) continue;
    plans.clear();
    ++forgotten;
    Py_XINCREF(value);
    std::swap(value, planned_under[i]);
    Py_XDECREF(value);
  }
}

// What executes a plan on a device; null for Python.
const Backend* backend_of(at::Device device, long plan) {
  if (plan <= PYTHON) return nullptr;
  const Backend*& backend = backends[{device.str(), plan}];
  const long count = plan >> MULTIPROCESSORS & ((1 << MULTIPROCESSOR_BITS) - 1);
  if (!backend && plan & RECIPES)
    backend = new RecipeBackend(device, plan, new CudaBackend(device, count));
  else if (!backend && plan & CUDA)
    backend = new CudaBackend(device, count);
  else if (!backend)
    backend = new CpuBackend(cpu_kernels(), plan);
  return backend;
}

// What computes a problem, by Python's plan where it is not known, null where Python's path does;
// throws what Python raises.
const Backend* planned(const Tensor& x, const Tensors& tensors, const Options& options,
                       PyObject* const* given) {
  follow_variables();
  const ProblemKey key(x, tensors, options);
  if (const auto found = plans.find(key); found != plans.end()) return found->second;
  const int64_t before = forgotten;
  PyObject* own_x = THPVariable_Wrap(x);
  if (!own_x) throw python_error();
  PyObject* answer = PyObject_CallFunction(
      python.plan, "NOOOOOOddsss", own_x, given[GIVEN_WEIGHT], given[GIVEN_A], given[GIVEN_B],
      given[GIVEN_CORE], given[GIVEN_MAGNITUDE], given[GIVEN_OUT_SCALE], options.scaling,
      options.dropout, axis_of(options), dropout_on_of(options),
      KEEPS[static_cast<int>(options.keep)]);
  const long plan = answer ? PyLong_AsLong(answer) : -1;
  Py_XDECREF(answer);
  if (PyErr_Occurred()) throw python_error();
  const Backend* backend = backend_of(x.device(), plan);
  // Another thread may have changed a variable meanwhile.
  if (plan != PROVISIONAL && forgotten == before) {
    if (plans.size() >= MOST_PLANS) plans.clear();
    plans.emplace(key, backend);
  }
  return backend;
}

// y of a call that the C++ kernels serve; undefined for every other. loan: as in recorded.
Tensor linear_or_none(PyObject* const* given, PyObject* loan) {
  Tensor x;
  Tensors t;
  Options options;
  int keep;
  Tensor* const tensors[] = {&x,           &t.weight, &t.bias,      &t.A,         &t.B,   &t.core,
                             &t.magnitude, &t.norm,   &t.out_scale, &t.lora_bias, &t.seed};
  if (observers_active() || forward_ad_active()) return {};
  for (int i = 0; i <= GIVEN_SEED; ++i)
    if (!read(given[i], *tensors[i])) return {};
  if (!read_options(given, options, keep) || !fits(x, t, options.in_axis)) return {};
  const bool computes_norm = given[COMPUTES_NORM] == Py_True;
  if (t.magnitude.defined() && !t.norm.defined() && !computes_norm) return {};
  if (options.frozen_columns > t.A.size(0)) return {};
  const auto device = x.device();
  const bool autocast = at::autocast::is_autocast_enabled(device.type());
  auto dtype = x.scalar_type();
  if (dtype != at::kDouble && autocast) dtype = at::autocast::get_autocast_dtype(device.type());
  const bool casts = autocast && t.weight.scalar_type() != at::kDouble && dtype != at::kDouble;
  if (t.weight.scalar_type() != dtype && !casts) return {};
  const bool grad = at::GradMode::is_enabled();
  if (grad && t.weight.requires_grad()) return {};
  const bool trains_gain = grad && (requires_grad(t.magnitude) || requires_grad(t.norm));
  if (t.magnitude.defined())
    options.keep =
        resolved(keep, options, trains_gain, t.bias.defined() || t.lora_bias.defined(), dtype);
  if (x.scalar_type() != dtype) {
    const WithoutGil released;
    x = x.to(dtype);
  }
  const Backend* backend = planned(x, t, options, given);
  if (!backend) return {};
  if (options.dropout == 0)
    t.seed = Tensor();
  else if (!t.seed.defined())
    t.seed = at::randint(std::numeric_limits<int64_t>::max(), {1},
                         at::TensorOptions(at::kLong).device(device));
  if (t.magnitude.defined() && !t.norm.defined()) t.norm = detached_norm(*backend, t, options);
  if (grad && any_requires_grad(x, t)) return recorded(*backend, x, t, options, loan);
  return computed(*backend, x, t, options).y;
}

// The same for x, a lora.Linear of PEFT, and the classes of its parts.
Tensor peft_linear_or_none(PyObject* x, PyObject* layer, PyObject* classes) {
  static PyObject* const axis = PyUnicode_InternFromString("out");
  static PyObject* const dropout_on = PyUnicode_InternFromString("adapter");
  static PyObject* const keep = PyUnicode_InternFromString("auto");
  static PyObject* const transpose = PyUnicode_InternFromString("t");
  static PyObject* const zero = PyLong_FromLong(0);
  PeftCall call;
  Tensor own_x, weight;
  if (observers_active() || !read(x, own_x)) return {};
  if (!read_peft_layer(layer, classes, at::GradMode::is_enabled(), call)) return {};
  if (!read(call.weight, weight) || weight.requires_grad() || weight.dim() != 2) return {};
  if (call.transposed) {
    PyObject* matrix = PyObject_CallMethodNoArgs(call.weight, transpose);
    if (!matrix) throw python_error();
    Py_SETREF(call.weight, matrix);
  }
  PyObject* const given[ARGUMENTS] = {x,       call.weight,  call.bias,    call.A,  call.B,
                                      Py_None, Py_None,      Py_None,      Py_None, call.lora_bias,
                                      Py_None, call.scaling, call.dropout, axis,    dropout_on,
                                      keep,    zero,         Py_True};
  return linear_or_none(given, nullptr);
}

PyObject* linear(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != ARGUMENTS && count != ARGUMENTS + 1 && count != 3)
    return PyErr_Format(PyExc_TypeError, "takes %d, %d or 3 arguments, not %zd", ARGUMENTS,
                        ARGUMENTS + 1, count);
  Tensor y = count == 3 ? peft_linear_or_none(given[0], given[1], given[2])
                        : linear_or_none(given, count == ARGUMENTS ? nullptr : given[ARGUMENTS]);
  if (!y.defined()) Py_RETURN_NONE;
  return THPVariable_Wrap(std::move(y));
  END_HANDLE_TH_ERRORS
}

PyObject* configure(PyObject*, PyObject* arguments) {
  Python given;
  if (!PyArg_ParseTuple(arguments, "OOOOOOOOOO!O!O!", &given.kernels, &given.load_form, &given.plan,
                        &given.backward, &given.modified, &given.panels, &given.compute,
                        &given.tensor_map, &given.give_back, &PyDict_Type, &given.environ,
                        &PyTuple_Type, &given.variables, &PyDict_Type, &given.forward_ad))
    return nullptr;
  for (PyObject* kept : {given.kernels, given.load_form, given.plan, given.backward, given.modified,
                         given.panels, given.compute, given.tensor_map, given.give_back,
                         given.environ, given.variables, given.forward_ad})
    Py_INCREF(kept);
  python = given;
  plans.clear();
  backends.clear();
  ++forgotten;
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"linear", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&linear)), METH_FASTCALL,
     nullptr},
    {"configure", configure, METH_VARARGS, nullptr},
    {},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, LORAFAST_TEXT_OF(LORAFAST_MODULE), nullptr, -1,
                      methods};

}  // namespace

}  // namespace lorafast::host

PyMODINIT_FUNC LORAFAST_INIT_OF(LORAFAST_MODULE)() {
  return PyModule_Create(&lorafast::host::module);
}
