#include "call.h"

#include <torch/csrc/Dtype.h>
#include <torch/csrc/autograd/python_variable.h>

namespace lorafast::launches {
namespace {

enum Tag : uint64_t { TENSOR = 1, DESCRIPTOR, SIZE, COUNT, FLOAT, NONE, TRUE_, FALSE_, TEXT };

bool fits_int32(int64_t value) { return value == static_cast<int32_t>(value); }

}  // namespace

bool read_int(PyObject* object, int64_t& value) {
  if (!PyLong_CheckExact(object)) return false;
  int overflow;
  value = PyLong_AsLongLongAndOverflow(object, &overflow);
  return !overflow;
}

namespace {

bool read_ints(PyObject* sequence, std::vector<int64_t>& values) {
  const Object fast(PySequence_Fast(sequence, "not a sequence"));
  if (!fast) return false;
  values.resize(static_cast<size_t>(PySequence_Fast_GET_SIZE(fast.get())));
  for (size_t i = 0; i < values.size(); ++i)
    if (!read_int(PySequence_Fast_GET_ITEM(fast.get(), static_cast<Py_ssize_t>(i)), values[i]))
      return false;
  return values.size() <= MOST_DIMS;
}

// Whether Triton may be passed by: nothing follows or changes launches.
bool is_quiet(const State& state, PyObject* kernel) {
  for (const auto& [owner, name, wanted] : state.watched) {
    const Object found(PyObject_GetAttr(owner.get(), name.get()));
    if (!found) return false;
    if (wanted ? found.get() != wanted.get() : PyObject_IsTrue(found.get()) != 0) return false;
  }
  const Object found(PyObject_GetAttr(kernel, state.kernel_watched.get()));
  return found && PyObject_IsTrue(found.get()) == 0;
}

// Follow Triton to another driver, for which nothing is kept yet.
bool follow_driver(State& state) {
  static PyObject* const active = PyUnicode_InternFromString("_active");
  Object driver(PyObject_GetAttr(state.drivers.get(), active));
  if (!driver || driver.get() == Py_None) return false;
  if (driver.get() == state.driver.get()) return true;
  state.kernels.clear();
  state.current_device = Object(PyObject_GetAttrString(driver.get(), "get_current_device"));
  state.current_stream = Object(PyObject_GetAttrString(driver.get(), "get_current_stream"));
  if (!state.current_device || !state.current_stream) return false;
  state.driver = std::move(driver);
  return true;
}

bool add_tensor(const State& state, const at::Tensor& tensor, int64_t device, Call& call) {
  const at::Device own = tensor.device();
  if (own.type() != state.device_type || (own.has_index() && own.index() != device)) return false;
  if (tensor.layout() != at::kStrided) return false;
  const auto address = reinterpret_cast<uint64_t>(tensor.mutable_data_ptr());
  call.values[call.count] = address;
  const bool aligned = address % 16 == 0;
  call.key.add(TENSOR | static_cast<uint64_t>(tensor.scalar_type()) << 8 |
               static_cast<uint64_t>(aligned) << 16);
  return true;
}

}  // namespace

const Descriptor* descriptor_of(State& state, PyObject* object) {
  if (const auto found = state.descriptors.find(object); found != state.descriptors.end())
    return &found->second;
  Descriptor made;
  std::vector<int64_t> block;
  const Object base(PyObject_GetAttrString(object, "base"));
  const Object padding(PyObject_GetAttrString(object, "padding"));
  const Object rounds(PyObject_GetAttrString(object, "round_f32_to_tf32"));
  const Object shape(PyObject_GetAttrString(object, "shape"));
  const Object strides(PyObject_GetAttrString(object, "strides"));
  const Object blocks(PyObject_GetAttrString(object, "block_shape"));
  if (!base || !padding || !rounds || !shape || !strides || !blocks) return nullptr;
  const Object dtype(PyObject_GetAttrString(base.get(), "dtype"));
  if (!dtype || !THPDtype_Check(dtype.get()) || rounds.get() != Py_False ||
      !PyUnicode_Check(padding.get()) ||
      PyUnicode_CompareWithASCIIString(padding.get(), "zero") != 0)
    return nullptr;
  if (!read_ints(shape.get(), made.shape) || !read_ints(strides.get(), made.strides) ||
      !read_ints(blocks.get(), block) || made.shape.size() != made.strides.size())
    return nullptr;
  const auto scalar = reinterpret_cast<THPDtype*>(dtype.get())->scalar_type;
  made.key.push_back(DESCRIPTOR | static_cast<uint64_t>(scalar) << 8 | block.size() << 16);
  for (const int64_t size : block) made.key.push_back(static_cast<uint64_t>(size));
  made.self = Object::borrowed(object);
  return &state.descriptors.emplace(object, std::move(made)).first->second;
}

namespace {

// An argument that is no constexpr. sized: Triton compiles for the value of an int.
bool add_argument(State& state, PyObject* object, bool sized, int64_t device, Call& call) {
  if (call.count == MOST_ARGUMENTS) return false;
  call.arguments[call.count] = object;
  int64_t value;
  if (THPVariable_CheckExact(object)) {
    if (!add_tensor(state, THPVariable_Unpack(object), device, call)) return false;
  } else if (read_int(object, value)) {
    // Triton's type of an int depends on its value.
    if (!sized && !fits_int32(value)) return false;
    call.key.add(sized ? SIZE : COUNT);
    if (sized) call.key.add(static_cast<uint64_t>(value));
    call.values[call.count] = static_cast<uint64_t>(value);
  } else if (PyFloat_CheckExact(object)) {
    const auto single = static_cast<float>(PyFloat_AS_DOUBLE(object));
    call.values[call.count] = 0;
    std::memcpy(&call.values[call.count], &single, sizeof single);
    call.key.add(FLOAT);
  } else if (object == Py_None) {
    call.key.add(NONE);
  } else if (reinterpret_cast<PyObject*>(Py_TYPE(object)) == state.descriptor_type.get()) {
    const Descriptor* descriptor = descriptor_of(state, object);
    if (!descriptor) return false;
    for (const uint64_t word : descriptor->key) call.key.add(word);
  } else {
    return false;
  }
  ++call.count;
  return true;
}

// A constexpr: its name by address, which a kept kernel keeps alive.
bool add_flag(PyObject* name, PyObject* object, Key& key) {
  key.add(reinterpret_cast<uint64_t>(name));
  int64_t value;
  if (object == Py_True || object == Py_False) {
    key.add(object == Py_True ? TRUE_ : FALSE_);
  } else if (read_int(object, value)) {
    key.add(SIZE);
    key.add(static_cast<uint64_t>(value));
  } else if (PyUnicode_CheckExact(object)) {
    Py_ssize_t length;
    const char* text = PyUnicode_AsUTF8AndSize(object, &length);
    uint64_t word = 0;
    if (!text || length > static_cast<Py_ssize_t>(sizeof word)) return false;
    std::memcpy(&word, text, static_cast<size_t>(length));
    key.add(TEXT | static_cast<uint64_t>(length) << 8);
    key.add(word);
  } else {
    return false;
  }
  return true;
}

bool read_grid(PyObject* grid, Call& call) {
  if (!PyTuple_Check(grid)) return false;
  const Py_ssize_t dims = PyTuple_GET_SIZE(grid);
  if (dims < 1 || dims > 3) return false;
  for (Py_ssize_t i = 0; i < dims; ++i) {
    const bool is_int = read_int(PyTuple_GET_ITEM(grid, i), call.grid[i]);
    if (!is_int || !fits_int32(call.grid[i]) || call.grid[i] < 0) return false;
  }
  return true;
}

}  // namespace

bool read_call(State& state, PyObject* const* given, size_t count, PyObject* names, Call& call,
               Object& device) {
  if (count < 3) return false;
  call.kernel = given[0];
  const auto declared = state.declared.find(call.kernel);
  if (declared == state.declared.end() || !is_quiet(state, call.kernel) || !follow_driver(state))
    return false;
  device = Object(PyObject_CallNoArgs(state.current_device.get()));
  int64_t index;
  if (!device || !read_int(device.get(), index) || !read_grid(given[1], call)) return false;
  call.key.add(reinterpret_cast<uint64_t>(call.kernel));
  call.key.add(static_cast<uint64_t>(index));
  call.key.add(count);
  if (!PyTuple_Check(given[2])) return false;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(given[2]); ++i) {
    int64_t size;
    if (!read_int(PyTuple_GET_ITEM(given[2], i), size)) return false;
    call.key.add(static_cast<uint64_t>(size));
  }
  const std::string& sized = declared->second.second;
  if (count - 3 > sized.size()) return false;
  if (state.descriptors.size() > MOST_KEPT_DESCRIPTORS) state.descriptors.clear();
  for (size_t i = 3; i < count; ++i)
    if (!add_argument(state, given[i], sized[i - 3] != 0, index, call)) return false;
  const auto flags = static_cast<size_t>(names ? PyTuple_GET_SIZE(names) : 0);
  for (size_t i = 0; i < flags; ++i) {
    PyObject* name = PyTuple_GET_ITEM(names, static_cast<Py_ssize_t>(i));
    if (!add_flag(name, given[count + i], call.key)) return false;
  }
  return call.key.fits();
}

}  // namespace lorafast::launches
