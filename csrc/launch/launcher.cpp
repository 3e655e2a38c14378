// The Python module, and its type Launcher. A Launcher takes the arguments of a launch as
// lorafast/engine/kernels/launch.py has them. It launches a kernel that is kept for such arguments
// by the driver, and leaves every other launch to a function of Python.
//
// What the driver gets is what Triton's own launcher gives it. Everything private of Triton is told
// by lorafast/engine/kernels/triton_internals.py.
#include <ATen/ops/empty.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>

#include "../cpu/module_name.h"
#include "call.h"
#include "cuda_kernel.h"

namespace lorafast::launches {
namespace {

struct Launcher {
  PyObject base;
  vectorcallfunc call;
  State* state;
};

// ---------------------------------------------------------------------------------------------
// The launch.

// The parameters that a descriptor becomes: its tensor map, its shape and its strides.
struct Expanded {
  TensorMap map;
  std::array<int64_t, 2 * MOST_DIMS> numbers;
};

// A tensor map as Triton encodes it: the last bytes of an object that its encoder returns.
bool encoded(const State& state, PyObject* descriptor, PyObject* meta, TensorMap& map) {
  const Object made(PyObject_CallFunctionObjArgs(state.encode.get(), descriptor, meta, nullptr));
  if (!made) return false;
  const Py_ssize_t size = Py_TYPE(made.get())->tp_basicsize;
  if (size < static_cast<Py_ssize_t>(sizeof map + sizeof(PyObject))) return false;
  std::memcpy(&map, reinterpret_cast<char*>(made.get()) + size - sizeof map, sizeof map);
  return true;
}

bool expand(State& state, PyObject* object, PyObject* meta, Expanded& into, size_t& numbers) {
  // What Triton's encoder does may make entries, or remove them all.
  const Descriptor* entry = descriptor_of(state, object);
  if (!entry) return false;
  const TensorMap* map = nullptr;
  for (const auto& [own, kept] : entry->maps)
    if (own.get() == meta) map = &kept;
  if (map) {
    into.map = *map;
  } else {
    if (!encoded(state, object, meta, into.map) || !(entry = descriptor_of(state, object)))
      return false;
    state.descriptors.at(object).maps.emplace_back(Object::borrowed(meta), into.map);
  }
  numbers = 0;
  for (const auto* values : {&entry->shape, &entry->strides})
    for (const int64_t value : *values) into.numbers[numbers++] = value;
  return true;
}

// True if the driver has launched the kernel.
bool launched(State& state, const std::shared_ptr<const Kernel>& kernel, Call& call,
              PyObject* device) {
  const Object stream(PyObject_CallOneArg(state.current_stream.get(), device));
  if (!stream || !PyLong_Check(stream.get())) return false;
  // Two more follow the arguments: scratch memory, of which a kept kernel needs none.
  std::array<void*, MOST_ARGUMENTS + 2 + MOST_DESCRIPTORS * 2 * MOST_DIMS> params;
  std::array<Expanded, MOST_DESCRIPTORS> expanded;
  size_t count = 0, descriptors = 0;
  for (const Param& param : kernel->params) {
    if (param.kind == Kind::NUMBER) {
      params[count++] = &call.values[param.argument];
      continue;
    }
    size_t numbers;
    Expanded& own = expanded[descriptors++];
    if (!expand(state, call.arguments[param.argument], param.meta, own, numbers)) return false;
    params[count++] = &own.map;
    for (size_t i = 0; i < numbers; ++i) params[count++] = &own.numbers[i];
  }
  uint64_t nothing = 0;
  params[count++] = &nothing;
  params[count++] = &nothing;
  LaunchConfig config{};
  for (int i = 0; i < 3; ++i) {
    if (call.grid[i] == 0) return true;
    config.grid[i] = static_cast<unsigned>(call.grid[i]);
  }
  config.block[0] = kernel->threads;
  config.block[1] = config.block[2] = 1;
  config.shared = kernel->shared;
  config.stream = reinterpret_cast<void*>(PyLong_AsUnsignedLongLong(stream.get()));
  if (PyErr_Occurred()) return false;
  const LaunchKernel launch = state.launch;
  int refused;
  Py_BEGIN_ALLOW_THREADS;
  refused = launch(&config, kernel->function, params.data(), nullptr);
  Py_END_ALLOW_THREADS;
  return refused == 0;
}

PyObject* launcher_call(PyObject* self, PyObject* const* given, size_t nargsf, PyObject* names) {
  HANDLE_TH_ERRORS
  State& state = *reinterpret_cast<Launcher*>(self)->state;
  const auto count = static_cast<size_t>(PyVectorcall_NARGS(nargsf));
  Call call;
  Object device;
  if (read_call(state, given, count, names, call, device)) {
    const auto found = state.kernels.find(call.key.view());
    if (found != state.kernels.end()) {
      const std::shared_ptr<const Kernel> kernel = found->second;
      if (launched(state, kernel, call, device.get())) Py_RETURN_NONE;
    }
  }
  // Whatever is unusual, and what the driver has refused, is Triton's to launch or to explain.
  PyErr_Clear();
  return PyObject_Vectorcall(state.slow.get(), given, nargsf, names);
  END_HANDLE_TH_ERRORS
}

// ---------------------------------------------------------------------------------------------
// What Python tells.

// declare(kernel, sized): kernels of this function may be kept. sized: bytes, for each argument 1
// if Triton compiles for the value of an int.
PyObject* declare(PyObject* self, PyObject* arguments) {
  PyObject* kernel;
  PyObject* sized;
  if (!PyArg_ParseTuple(arguments, "OO!", &kernel, &PyBytes_Type, &sized)) return nullptr;
  State& state = *reinterpret_cast<Launcher*>(self)->state;
  const auto count = static_cast<size_t>(PyBytes_GET_SIZE(sized));
  state.declared[kernel] = {Object::borrowed(kernel), std::string(PyBytes_AS_STRING(sized), count)};
  Py_RETURN_NONE;
}

// The parameters of a kernel from its arguments' kinds, a list: "number", None for an argument that
// is no parameter, or what Triton says about a descriptor.
bool read_params(PyObject* kinds, std::vector<Param>& params) {
  size_t descriptors = 0;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(kinds); ++i) {
    PyObject* kind = PyList_GET_ITEM(kinds, i);
    const auto argument = static_cast<uint8_t>(i);
    if (kind == Py_None) continue;
    if (PyUnicode_Check(kind)) {
      params.push_back({Kind::NUMBER, argument, nullptr});
    } else {
      params.push_back({Kind::DESCRIPTOR, argument, kind});
      ++descriptors;
    }
  }
  return PyList_GET_SIZE(kinds) <= static_cast<Py_ssize_t>(MOST_ARGUMENTS) &&
         descriptors <= MOST_DESCRIPTORS;
}

// keep(function, warps, shared, kinds, kernel, grid, tile, *arguments, **flags): keep a compiled
// kernel for such arguments. Returns True if it is kept.
PyObject* keep(PyObject* self, PyObject* const* given, Py_ssize_t count, PyObject* names) {
  HANDLE_TH_ERRORS
  State& state = *reinterpret_cast<Launcher*>(self)->state;
  constexpr Py_ssize_t OWN = 4;
  int64_t function, warps, shared;
  if (count < OWN || !read_int(given[0], function) || !read_int(given[1], warps) ||
      !read_int(given[2], shared) || !PyList_Check(given[3]))
    return PyErr_Format(PyExc_TypeError, "keep takes a function, warps, shared memory and kinds");
  Call call;
  Object device;
  auto kernel = std::make_shared<Kernel>();
  const bool kept =
      read_call(state, given + OWN, static_cast<size_t>(count - OWN), names, call, device) &&
      read_params(given[3], kernel->params) &&
      PyList_GET_SIZE(given[3]) == static_cast<Py_ssize_t>(call.count);
  if (!kept) {
    PyErr_Clear();
    Py_RETURN_FALSE;
  }
  kernel->function = reinterpret_cast<void*>(function);
  kernel->threads = static_cast<unsigned>(32 * warps);
  kernel->shared = static_cast<unsigned>(shared);
  kernel->references = Object(PyTuple_Pack(2, given[3], names ? names : Py_None));
  if (!kernel->references) return nullptr;
  if (state.kernels.size() >= MOST_KERNELS) state.kernels.clear();
  const auto words = call.key.view();
  state.kernels[{words.begin(), words.end()}] = std::move(kernel);
  Py_RETURN_TRUE;
  END_HANDLE_TH_ERRORS
}

// forget(): forget all kernels and descriptors.
PyObject* forget(PyObject* self, PyObject*) {
  State& state = *reinterpret_cast<Launcher*>(self)->state;
  state.kernels.clear();
  state.descriptors.clear();
  Py_RETURN_NONE;
}

// empty(like, dtype, *shape): an uninitialised tensor on the device of another.
PyObject* empty(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count < 2 || count > 2 + static_cast<Py_ssize_t>(MOST_DIMS) || !THPVariable_Check(given[0]) ||
      !THPDtype_Check(given[1]))
    return PyErr_Format(PyExc_TypeError, "empty takes a tensor, a dtype and at most 5 sizes");
  std::array<int64_t, MOST_DIMS> sizes;
  const auto dims = static_cast<size_t>(count - 2);
  for (size_t i = 0; i < dims; ++i)
    if (!read_int(given[2 + i], sizes[i]))
      return PyErr_Format(PyExc_TypeError, "size %zu is no int", i);
  const at::Tensor& like = THPVariable_Unpack(given[0]);
  const auto dtype = reinterpret_cast<THPDtype*>(given[1])->scalar_type;
  const auto options = at::TensorOptions().dtype(dtype).device(like.device());
  at::Tensor made;
  {
    // An allocator may wait for a device.
    const pybind11::gil_scoped_release released;
    made = at::empty({sizes.data(), dims}, options);
  }
  return THPVariable_Wrap(std::move(made));
  END_HANDLE_TH_ERRORS
}

bool read_watched(PyObject* list, State& state) {
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); ++i) {
    PyObject *owner, *name, *wanted;
    if (!PyArg_ParseTuple(PyList_GET_ITEM(list, i), "OUO", &owner, &name, &wanted)) return false;
    state.watched.emplace_back(Object::borrowed(owner), Object::borrowed(name),
                               Object::borrowed(wanted == Py_None ? nullptr : wanted));
  }
  return true;
}

// Launcher(slow, encode, watched, kernel_watched, drivers, descriptor_type, launch, device_type).
//
// slow: launches whatever is not kept. encode(descriptor, meta): a tensor map. watched: a list of
// (object, attribute, what it has to be, None for anything false). kernel_watched: the attribute of
// a kernel that has to be false. drivers: whose _active is Triton's driver. launch: the address of
// the driver's cuLaunchKernelEx. device_type: of all tensors.
PyObject* launcher_new(PyTypeObject* type, PyObject* arguments, PyObject*) {
  HANDLE_TH_ERRORS
  PyObject *slow, *encode, *watched, *kernel_watched, *drivers, *descriptor_type;
  unsigned long long launch;
  const char* device_type;
  if (!PyArg_ParseTuple(arguments, "OOO!UOOKs", &slow, &encode, &PyList_Type, &watched,
                        &kernel_watched, &drivers, &descriptor_type, &launch, &device_type))
    return nullptr;
  auto state = std::make_unique<State>();
  state->slow = Object::borrowed(slow);
  state->encode = Object::borrowed(encode);
  state->kernel_watched = Object::borrowed(kernel_watched);
  state->drivers = Object::borrowed(drivers);
  state->descriptor_type = Object::borrowed(descriptor_type);
  state->launch = reinterpret_cast<LaunchKernel>(launch);
  state->device_type = at::Device(device_type).type();
  if (!read_watched(watched, *state)) return nullptr;
  PyObject* self = type->tp_alloc(type, 0);
  if (!self) return nullptr;
  auto* launcher = reinterpret_cast<Launcher*>(self);
  launcher->call = launcher_call;
  launcher->state = state.release();
  return self;
  END_HANDLE_TH_ERRORS
}

void launcher_free(PyObject* self) {
  delete reinterpret_cast<Launcher*>(self)->state;
  Py_TYPE(self)->tp_free(self);
}

PyMethodDef launcher_methods[] = {
    {"declare", declare, METH_VARARGS, nullptr},
    {"keep", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&keep)),
     METH_FASTCALL | METH_KEYWORDS, nullptr},
    {"forget", forget, METH_NOARGS, nullptr},
    {"empty", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&empty)), METH_FASTCALL,
     nullptr},
    {},
};

PyTypeObject launcher_type = {PyVarObject_HEAD_INIT(nullptr, 0)};

PyModuleDef module = {PyModuleDef_HEAD_INIT, LORAFAST_TEXT_OF(LORAFAST_MODULE), nullptr, -1,
                      nullptr};

bool add_launcher(PyObject* made) {
  launcher_type.tp_name = "lorafast.Launcher";
  launcher_type.tp_basicsize = sizeof(Launcher);
  launcher_type.tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL;
  launcher_type.tp_vectorcall_offset = offsetof(Launcher, call);
  launcher_type.tp_call = PyVectorcall_Call;
  launcher_type.tp_new = launcher_new;
  launcher_type.tp_dealloc = launcher_free;
  launcher_type.tp_methods = launcher_methods;
  return PyModule_AddType(made, &launcher_type) == 0;
}

}  // namespace
}  // namespace lorafast::launches

PyMODINIT_FUNC LORAFAST_INIT_OF(LORAFAST_MODULE)() {
  PyObject* made = PyModule_Create(&lorafast::launches::module);
  if (made &&
      !(lorafast::launches::add_launcher(made) && lorafast::launches::add_cuda_kernel(made)))
    Py_CLEAR(made);
  return made;
}
