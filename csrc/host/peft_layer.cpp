#include "peft_layer.h"

#include <array>

namespace lorafast::host {
namespace {

struct Names {
  static PyObject* interned(const char* name) { return PyUnicode_InternFromString(name); }

  // Of every module.
  PyObject* const modules = interned("_modules");
  PyObject* const parameters = interned("_parameters");
  PyObject* const forward_hooks = interned("_forward_hooks");
  PyObject* const forward_pre_hooks = interned("_forward_pre_hooks");
  PyObject* const backward_hooks = interned("_backward_hooks");
  PyObject* const backward_pre_hooks = interned("_backward_pre_hooks");
  PyObject* const forward = interned("forward");
  PyObject* const hf_hook = interned("_hf_hook");
  PyObject* const weight = interned("weight");
  PyObject* const bias = interned("bias");
  PyObject* const p = interned("p");
  PyObject* const training = interned("training");
  // Of PEFT's layers.
  PyObject* const base_layer = interned("base_layer");
  PyObject* const lora_A = interned("lora_A");
  PyObject* const lora_B = interned("lora_B");
  PyObject* const lora_dropout = interned("lora_dropout");
  PyObject* const lora_variant = interned("lora_variant");
  PyObject* const scaling = interned("scaling");
  PyObject* const active_adapter = interned("_active_adapter");
  PyObject* const merged_adapters = interned("merged_adapters");
  PyObject* const disable_adapters = interned("_disable_adapters");
  PyObject* const cast_input_dtype_enabled = interned("cast_input_dtype_enabled");
  PyObject* const fan_in_fan_out = interned("fan_in_fan_out");
};

const Names& names() {
  static const Names all;
  return all;
}

// The entry of a dict, borrowed; null where there is none, or no dict that is read as plain ones
// are: a library may put one in its place that gathers an entry when it is read.
PyObject* entry(PyObject* dict, PyObject* name) {
  if (!dict || !(PyDict_CheckExact(dict) || PyODict_CheckExact(dict))) return nullptr;
  return PyDict_GetItemWithError(dict, name);
}

// The __dict__ of an object, borrowed from it; null if it has none.
PyObject* attributes_of(PyObject* object) {
  PyObject* found = object ? PyObject_GenericGetDict(object, nullptr) : nullptr;
  Py_XDECREF(found);
  return found;
}

bool is_empty(PyObject* dict) { return dict && PyDict_Check(dict) && PyDict_Size(dict) == 0; }

// The name of the one active adapter, borrowed, or null.
PyObject* active_adapter(PyObject* attributes) {
  PyObject* active = entry(attributes, names().active_adapter);
  if (active && PyList_CheckExact(active))
    active = PyList_GET_SIZE(active) == 1 ? PyList_GET_ITEM(active, 0) : nullptr;
  return active && PyUnicode_CheckExact(active) ? active : nullptr;
}

// True if the adapters of a layer are neither merged nor disabled, and plain LoRAs.
bool is_usual(PyObject* attributes) {
  const Names& of = names();
  PyObject* merged = entry(attributes, of.merged_adapters);
  return is_empty(entry(attributes, of.lora_variant)) && merged && PyList_CheckExact(merged) &&
         PyList_GET_SIZE(merged) == 0 && entry(attributes, of.disable_adapters) == Py_False &&
         entry(attributes, of.cast_input_dtype_enabled) == Py_True;
}

// A module's attributes, and its class.
struct Part {
  explicit Part(PyObject* module)
      : attributes(attributes_of(module)),
        type(module ? reinterpret_cast<PyObject*>(Py_TYPE(module)) : nullptr) {}

  PyObject* parameter(PyObject* name) const {
    return entry(entry(attributes, names().parameters), name);
  }

  PyObject* attributes;
  PyObject* type;
};

// lora_A, lora_B and the dropout of an adapter, and the base layer.
using Parts = std::array<Part, 4>;

// One step for all parts, then the next one: each reads memory that is seldom in a cache, and reads
// that do not depend on each other overlap.
Parts parts_of(PyObject* modules, PyObject* adapter) {
  const Names& of = names();
  PyObject* found[] = {entry(modules, of.lora_A), entry(modules, of.lora_B),
                       entry(modules, of.lora_dropout)};
  for (PyObject*& part : found) part = attributes_of(part);
  for (PyObject*& part : found) part = entry(part, of.modules);
  for (PyObject*& part : found) part = entry(part, adapter);
  return {Part(found[0]), Part(found[1]), Part(found[2]), Part(entry(modules, of.base_layer))};
}

// True if no module need be called itself: why_not_skippable of peft_support.py.
bool are_skippable(const Parts& parts, bool grad) {
  const Names& of = names();
  PyObject* const hooks[] = {of.forward_hooks, of.forward_pre_hooks, of.backward_hooks,
                             of.backward_pre_hooks};
  for (int i = 0; i < (grad ? 4 : 2); ++i)
    for (const Part& part : parts)
      if (!is_empty(entry(part.attributes, hooks[i]))) return false;
  for (const Part& part : parts)
    if (entry(part.attributes, of.forward) || entry(part.attributes, of.hf_hook)) return false;
  return true;
}

// The probability with which a dropout module drops now, borrowed; null if it is unusual.
PyObject* probability(const Part& dropout, PyObject* classes) {
  static PyObject* const none = PyFloat_FromDouble(0);
  const Names& of = names();
  if (dropout.type == PyTuple_GET_ITEM(classes, 3)) return none;
  if (dropout.type != PyTuple_GET_ITEM(classes, 2)) return nullptr;
  PyObject* training = entry(dropout.attributes, of.training);
  if (training == Py_False) return none;
  return training == Py_True ? entry(dropout.attributes, of.p) : nullptr;
}

bool read(PyObject* layer, PyObject* classes, bool grad, PeftCall& call) {
  const Names& of = names();
  PyObject* linear = PyTuple_GET_ITEM(classes, 0);
  PyObject* own = attributes_of(layer);
  if (!is_usual(own)) return false;
  PyObject* adapter = active_adapter(own);
  PyObject* modules = entry(own, of.modules);
  PyObject* transposed = entry(own, of.fan_in_fan_out);
  if (!adapter || (transposed != Py_True && transposed != Py_False)) return false;
  call.transposed = transposed == Py_True;
  const Parts parts = parts_of(modules, adapter);
  const auto& [A, B, dropout, base] = parts;
  if (base.type != PyTuple_GET_ITEM(classes, call.transposed ? 1 : 0) || A.type != linear ||
      B.type != linear)
    return false;
  if (!are_skippable(parts, grad)) return false;
  PyObject* bias_of_A = A.parameter(of.bias);
  if (bias_of_A && bias_of_A != Py_None) return false;
  call.weight = Py_XNewRef(base.parameter(of.weight));
  call.bias = Py_XNewRef(base.parameter(of.bias));
  call.A = Py_XNewRef(A.parameter(of.weight));
  call.B = Py_XNewRef(B.parameter(of.weight));
  call.lora_bias = Py_XNewRef(B.parameter(of.bias));
  call.scaling = Py_XNewRef(entry(entry(own, of.scaling), adapter));
  call.dropout = Py_XNewRef(probability(dropout, classes));
  return call.weight && call.bias && call.A && call.B && call.lora_bias && call.scaling &&
         call.dropout;
}

}  // namespace

bool read_peft_layer(PyObject* layer, PyObject* classes, bool grad, PeftCall& call) {
  const bool usual = read(layer, classes, grad, call);
  if (PyErr_Occurred()) {
    PyErr_Clear();
    return false;
  }
  return usual;
}

}  // namespace lorafast::host
