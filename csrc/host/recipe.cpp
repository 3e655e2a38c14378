#include "recipe.h"

#include <ATen/ScalarOps.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <torch/csrc/Device.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/Layout.h>
#include <torch/csrc/MemoryFormat.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <string>

#include "cuda_forms.h"
#include "python.h"

namespace lorafast::host {
namespace {

using at::Tensor;

// Items of tuples and lists of Python, whose types recipes.py answers for.
PyObject* item(PyObject* sequence, Py_ssize_t index) {
  PyObject* found =
      PyTuple_Check(sequence) ? PyTuple_GetItem(sequence, index) : PyList_GetItem(sequence, index);
  if (!found) throw python_error();
  return found;
}

Py_ssize_t length_of(PyObject* sequence) {
  const Py_ssize_t length = PySequence_Size(sequence);
  if (length < 0) throw python_error();
  return length;
}

int64_t integer(PyObject* object) {
  const int64_t value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred()) throw python_error();
  return value;
}

// 64 bits, of a signed number or of an address.
uint64_t bits(PyObject* object) {
  const uint64_t value = PyLong_AsUnsignedLongLongMask(object);
  if (PyErr_Occurred()) throw python_error();
  return value;
}

std::vector<int64_t> integers(PyObject* sequence) {
  std::vector<int64_t> values;
  for (Py_ssize_t i = 0; i < length_of(sequence); ++i) values.push_back(integer(item(sequence, i)));
  return values;
}

at::ScalarType dtype_of(PyObject* object) {
  TORCH_CHECK(THPDtype_Check(object), "a recipe has a ", Py_TYPE(object)->tp_name, " for a dtype");
  return reinterpret_cast<THPDtype*>(object)->scalar_type;
}

// A number among tensors: torch's operations tell it from a tensor of no dimensions.
Tensor wrapped_number(const c10::Scalar& number) {
  Tensor made = c10::scalar_to_tensor(number);
  made.unsafeGetTensorImpl()->set_wrapped_number(true);
  return made;
}

c10::Scalar number_of(PyObject* object) {
  if (PyBool_Check(object)) return object == Py_True;
  if (PyFloat_Check(object)) return PyFloat_AS_DOUBLE(object);
  return integer(object);
}

// The value of an argument that is no tensor, of the type that its operation declares.
c10::IValue value_of(PyObject* object, const c10::TypePtr& declared) {
  if (object == Py_None) return {};
  if (const auto optional = declared->cast<c10::OptionalType>())
    return value_of(object, optional->getElementType());
  if (declared->kind() == c10::TypeKind::TensorType) return wrapped_number(number_of(object));
  if (declared->kind() == c10::TypeKind::FloatType) return number_of(object).toDouble();
  if (THPDtype_Check(object)) return static_cast<int64_t>(dtype_of(object));
  if (THPDevice_Check(object)) return reinterpret_cast<THPDevice*>(object)->device;
  if (THPLayout_Check(object))
    return static_cast<int64_t>(reinterpret_cast<THPLayout*>(object)->layout);
  if (THPMemoryFormat_Check(object))
    return static_cast<int64_t>(reinterpret_cast<THPMemoryFormat*>(object)->memory_format);
  if (PyList_Check(object)) return c10::List<int64_t>(integers(object));
  if (PyUnicode_Check(object)) {
    const char* text = PyUnicode_AsUTF8(object);
    if (!text) throw python_error();
    return std::string(text);
  }
  return number_of(object);
}

}  // namespace

Recipe::View::View(PyObject* noted) {
  if (noted == Py_None) return;
  slot = static_cast<int>(integer(item(noted, 0)));
  if (length_of(noted) == 1) return;
  whole = false;
  offset = integer(item(noted, 1));
  sizes = integers(item(noted, 2));
  strides = integers(item(noted, 3));
  dtype = c10::scalarTypeToTypeMeta(dtype_of(item(noted, 4)));
}

Tensor Recipe::View::of(const Slots& slots) const {
  if (slot < 0) return {};
  const Tensor& base = slots[static_cast<size_t>(slot)];
  if (whole) return base;
  Tensor made = at::detail::make_tensor<c10::TensorImpl>(
      c10::TensorImpl::VIEW, c10::Storage(base.storage()), base.key_set(), dtype);
  const int64_t first = base.storage_offset() * static_cast<int64_t>(base.itemsize()) + offset;
  made.unsafeGetTensorImpl()->set_storage_offset(first / static_cast<int64_t>(dtype.itemsize()));
  made.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides);
  return made;
}

launches::TensorMap Recipe::Maps::at(uint64_t address) const {
  {
    const std::lock_guard<std::mutex> lock(mutex);
    if (const auto found = known.find(address); found != known.end()) return found->second;
  }
  const launches::TensorMap made = tensor_map(address, told);
  const std::lock_guard<std::mutex> lock(mutex);
  if (known.size() >= MOST_MAPS) known.clear();
  return known.try_emplace(address, made).first->second;
}

Recipe::Allocation Recipe::read_allocation(PyObject* noted) const {
  Allocation step{static_cast<int>(integer(item(noted, 1))), false, integers(item(noted, 2)),
                  integers(item(noted, 3)),
                  at::TensorOptions(dtype_of(item(noted, 4))).device(device)};
  step.is_contiguous =
      at::IntArrayRef(step.strides) == at::IntArrayRef(c10::contiguous_strides(step.sizes));
  return step;
}

Recipe::Operation Recipe::read_operation(PyObject* noted) const {
  const char* name = PyUnicode_AsUTF8(item(noted, 1));
  const char* overload = PyUnicode_AsUTF8(item(noted, 2));
  if (!name || !overload) throw python_error();
  Operation step{c10::Dispatcher::singleton().findSchemaOrThrow(name, overload), {}, {}, {}, {}};
  const auto& declared = step.function.schema().arguments();
  PyObject* given = item(noted, 3);
  TORCH_CHECK(length_of(given) == static_cast<Py_ssize_t>(declared.size()), name, " takes ",
              declared.size(), " arguments");
  for (size_t i = 0; i < declared.size(); ++i) {
    PyObject* argument = item(given, static_cast<Py_ssize_t>(i));
    step.values.emplace_back();
    if (PyTuple_Check(argument)) {
      step.tensors.emplace_back(i, View(argument));
    } else if (PyList_Check(argument) && length_of(argument) && PyTuple_Check(item(argument, 0))) {
      std::vector<View> views;
      for (Py_ssize_t j = 0; j < length_of(argument); ++j) views.emplace_back(item(argument, j));
      step.lists.emplace_back(i, std::move(views));
    } else {
      step.values.back() = value_of(argument, declared[i].type());
    }
  }
  for (const int64_t slot : integers(item(noted, 4))) step.made.push_back(static_cast<int>(slot));
  return step;
}

Recipe::Launch Recipe::read_launch(PyObject* noted) const {
  Launch step{reinterpret_cast<void*>(bits(item(noted, 1))), {}, {}};
  step.config.block[0] = static_cast<unsigned>(integer(item(noted, 2)));
  step.config.block[1] = step.config.block[2] = 1;
  step.config.shared = static_cast<unsigned>(integer(item(noted, 3)));
  for (Py_ssize_t i = 0; i < 3; ++i)
    step.config.grid[i] = static_cast<unsigned>(integer(item(item(noted, 4), i)));
  PyObject* given = item(noted, 5);
  for (Py_ssize_t i = 0; i < length_of(given); ++i) {
    PyObject* one = item(given, i);
    Parameter& made = step.parameters.emplace_back();
    if (!PyTuple_Check(one)) {
      made.value = bits(one);
      continue;
    }
    made.slot = static_cast<int>(integer(item(one, 0)));
    made.value = bits(item(one, 1));
    if (length_of(one) == 2) continue;
    made.maps = std::make_unique<Maps>(item(one, 2));
    ++step.maps;
  }
  return step;
}

Recipe::Recipe(PyObject* made, at::Device own) : device(own), noted(made) {
  driver_launch = reinterpret_cast<launches::LaunchKernel>(bits(item(noted, 0)));
  operand_count = static_cast<size_t>(integer(item(noted, 1)));
  slot_count = static_cast<size_t>(integer(item(noted, 2)));
  PyObject* each = item(noted, 3);
  for (Py_ssize_t i = 0; i < length_of(each); ++i) {
    PyObject* one = item(each, i);
    const char* kind = PyUnicode_AsUTF8(item(one, 0));
    if (!kind) throw python_error();
    if (std::strcmp(kind, "allocate") == 0)
      steps.push_back({read_allocation(one), {}});
    else if (std::strcmp(kind, "compute") == 0)
      steps.push_back({read_operation(one), {}});
    else
      steps.push_back({read_launch(one), {}});
  }
  PyObject* last = item(noted, 4);
  for (Py_ssize_t i = 0; i < length_of(last); ++i) results_from.emplace_back(item(last, i));
  watched = item(noted, 5);
  find_last();
  Py_INCREF(noted);
}

Recipe::~Recipe() {
  const Gil held;
  Py_DECREF(noted);
}

// Every step drops what only it and earlier ones read, as Python does.
void Recipe::find_last() {
  std::vector<bool> needed(slot_count, false);
  for (const View& view : results_from)
    if (view.slot >= 0) needed[static_cast<size_t>(view.slot)] = true;
  for (auto step = steps.rbegin(); step != steps.rend(); ++step) {
    const auto read = [&](int slot) {
      if (slot < static_cast<int>(operand_count) || needed[static_cast<size_t>(slot)]) return;
      needed[static_cast<size_t>(slot)] = true;
      step->last.push_back(slot);
    };
    if (const auto* allocation = std::get_if<Allocation>(&step->what)) {
      read(allocation->slot);
    } else if (const auto* operation = std::get_if<Operation>(&step->what)) {
      for (const auto& [place, view] : operation->tensors) read(view.slot);
      for (const auto& [place, views] : operation->lists)
        for (const View& view : views) read(view.slot);
      for (const int slot : operation->made) read(slot);
    } else {
      for (const Parameter& parameter : std::get<Launch>(step->what).parameters)
        read(parameter.slot);
    }
  }
}

bool Recipe::holds() const {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(watched); ++i) {
    PyObject* one = PyTuple_GET_ITEM(watched, i);
    PyObject* owner = PyTuple_GET_ITEM(one, 0);
    PyObject* name = PyTuple_GET_ITEM(one, 1);
    PyObject* wanted = PyTuple_GET_ITEM(one, 2);
    PyObject* found = nullptr;
    if (PyDict_CheckExact(owner))
      found = Py_XNewRef(PyDict_GetItemWithError(owner, name));
    else
      found = PyObject_GetAttr(owner, name);
    PyErr_Clear();
    const bool same = wanted != Py_None ? found == wanted : !found || PyObject_IsTrue(found) == 0;
    Py_XDECREF(found);
    if (!same) return false;
  }
  return true;
}

bool Recipe::run_launch(const Launch& step, const Slots& slots) const {
  c10::SmallVector<uint64_t, 48> values;
  c10::SmallVector<void*, 48> params;
  c10::SmallVector<launches::TensorMap, 8> maps;
  const size_t count = step.parameters.size();
  values.resize(count);
  params.resize(count);
  maps.reserve(step.maps);
  for (size_t i = 0; i < count; ++i) {
    const Parameter& parameter = step.parameters[i];
    values[i] = parameter.value;
    params[i] = &values[i];
    if (parameter.slot < 0) continue;
    values[i] += reinterpret_cast<uint64_t>(slots[static_cast<size_t>(parameter.slot)].data_ptr());
    if (!parameter.maps) continue;
    maps.push_back(parameter.maps->at(values[i]));
    params[i] = &maps.back();
  }
  launches::LaunchConfig config = step.config;
  config.stream = cuda::stream_of(device);
  return driver_launch(&config, step.function, params.data(), nullptr) == 0;
}

bool Recipe::run(c10::ArrayRef<const Tensor*> operands, std::vector<Tensor>& results) const {
  TORCH_CHECK(operands.size() == operand_count, "a recipe takes ", operand_count, " operands");
  Slots slots(slot_count);
  for (size_t i = 0; i < operand_count; ++i) slots[i] = *operands[i];
  for (const Step& step : steps) {
    if (const auto* launch = std::get_if<Launch>(&step.what)) {
      if (!run_launch(*launch, slots)) return false;
    } else if (const auto* made = std::get_if<Allocation>(&step.what)) {
      slots[static_cast<size_t>(made->slot)] =
          made->is_contiguous ? at::empty(made->sizes, made->options)
                              : at::empty_strided(made->sizes, made->strides, made->options);
    } else {
      const auto& operation = std::get<Operation>(step.what);
      torch::jit::Stack stack(operation.values.begin(), operation.values.end());
      for (const auto& [place, view] : operation.tensors) stack[place] = view.of(slots);
      for (const auto& [place, views] : operation.lists) {
        c10::List<Tensor> list;
        for (const View& view : views) list.push_back(view.of(slots));
        stack[place] = std::move(list);
      }
      operation.function.callBoxed(stack);
      for (size_t i = 0; i < operation.made.size(); ++i)
        if (operation.made[i] >= 0)
          slots[static_cast<size_t>(operation.made[i])] = std::move(stack[i]).toTensor();
    }
    for (const int slot : step.last) slots[static_cast<size_t>(slot)].reset();
  }
  results.clear();
  for (const View& view : results_from) results.push_back(view.of(slots));
  return true;
}

}  // namespace lorafast::host
