// CudaKernel(launch, function, threads, parameters, stream_of, device_type)(grid, *arguments)
// launches a kernel on the device of its first tensor and on torch's current stream there.
//
// The parameters are a letter each: p a tensor's address, 0 for None; q 64 bits; i 32 bits; f fp32.
#include "cuda_kernel.h"

#include <c10/core/DeviceGuard.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>

#include "call.h"

namespace lorafast::launches {
namespace {

struct CudaForm {
  LaunchKernel launch;
  void* function;
  unsigned threads;
  std::string parameters;
  Object stream_of;
  at::DeviceType device_type;
};

struct CudaKernel {
  PyObject base;
  vectorcallfunc call;
  CudaForm* form;
};

PyObject* refused(Py_ssize_t index, const char* wanted, PyObject* given) {
  return PyErr_Format(PyExc_TypeError, "argument %zd has to be %s, not %s", index, wanted,
                      Py_TYPE(given)->tp_name);
}

// The values of a launch, each in the first bytes of a word, and the device of its tensors.
struct Values {
  std::array<uint64_t, MOST_ARGUMENTS> words{};
  at::Device device{at::DeviceType::CPU};
  bool has_tensor = false;
};

bool read_tensor(const CudaForm& form, PyObject* object, Py_ssize_t index, Values& values) {
  if (object == Py_None) return true;
  if (!THPVariable_Check(object)) return refused(index, "a tensor or None", object);
  const at::Tensor& tensor = THPVariable_Unpack(object);
  if (tensor.device().type() != form.device_type ||
      (values.has_tensor && tensor.device() != values.device)) {
    const std::string where = tensor.device().str();
    PyErr_Format(PyExc_ValueError, "argument %zd is on %s, unlike the kernel or its other tensors",
                 index, where.c_str());
    return false;
  }
  values.device = tensor.device();
  values.has_tensor = true;
  values.words[static_cast<size_t>(index)] = reinterpret_cast<uint64_t>(tensor.mutable_data_ptr());
  return true;
}

// False with an exception set for what does not fit its letter.
bool read_value(const CudaForm& form, char letter, PyObject* object, Py_ssize_t index,
                Values& values) {
  uint64_t& word = values.words[static_cast<size_t>(index)];
  if (letter == 'p') return read_tensor(form, object, index, values);
  if (letter == 'f') {
    const double value = PyFloat_AsDouble(object);
    if (value == -1 && PyErr_Occurred()) return false;
    const auto single = static_cast<float>(value);
    std::memcpy(&word, &single, sizeof single);
    return true;
  }
  int64_t value;
  if (PyBool_Check(object))
    value = object == Py_True;
  else if (!read_int(object, value))
    return refused(index, "an int of at most 64 bits", object);
  // Signed or unsigned, as the kernel has it.
  if (letter == 'i' && (value < INT32_MIN || value > int64_t{UINT32_MAX})) {
    PyErr_Format(PyExc_OverflowError, "argument %zd has to fit 32 bits, not %lld", index,
                 static_cast<long long>(value));
    return false;
  }
  word = static_cast<uint64_t>(value);
  return true;
}

bool read_config(const CudaForm& form, PyObject* grid, LaunchConfig& config, bool& is_empty) {
  if (!PyTuple_Check(grid) || PyTuple_GET_SIZE(grid) < 1 || PyTuple_GET_SIZE(grid) > 3) {
    PyErr_SetString(PyExc_TypeError, "grid has to be a tuple of 1 to 3 ints");
    return false;
  }
  is_empty = false;
  for (Py_ssize_t i = 0; i < 3; ++i) {
    int64_t size = 1;
    if (i < PyTuple_GET_SIZE(grid) && !read_int(PyTuple_GET_ITEM(grid, i), size))
      return refused(i, "an int of the grid", PyTuple_GET_ITEM(grid, i));
    // CUDA's own limits: of the second and the third too.
    if (size < 0 || size > (i ? 65535 : INT32_MAX)) {
      PyErr_Format(PyExc_OverflowError, "size %zd of the grid is %lld, beyond CUDA's limit", i,
                   static_cast<long long>(size));
      return false;
    }
    is_empty |= size == 0;
    config.grid[i] = static_cast<unsigned>(size);
  }
  config.block[0] = form.threads;
  config.block[1] = config.block[2] = 1;
  return true;
}

PyObject* cuda_kernel_call(PyObject* self, PyObject* const* given, size_t nargsf, PyObject* names) {
  HANDLE_TH_ERRORS
  const CudaForm& form = *reinterpret_cast<CudaKernel*>(self)->form;
  const auto count = static_cast<size_t>(PyVectorcall_NARGS(nargsf));
  if (names || count != form.parameters.size() + 1)
    return PyErr_Format(PyExc_TypeError, "takes a grid and %zu arguments, not %zu",
                        form.parameters.size(), count);
  LaunchConfig config{};
  bool is_empty;
  if (!read_config(form, given[0], config, is_empty)) return nullptr;
  Values values;
  std::array<void*, MOST_ARGUMENTS> params;
  for (size_t i = 0; i < form.parameters.size(); ++i) {
    if (!read_value(form, form.parameters[i], given[i + 1], static_cast<Py_ssize_t>(i), values))
      return nullptr;
    params[i] = &values.words[i];
  }
  if (is_empty) Py_RETURN_NONE;
  // The handle of a default stream is 0, which stands for that of the current device.
  c10::OptionalDeviceGuard guard;
  if (values.has_tensor) guard.reset_device(values.device);
  const Object device(PyLong_FromLong(values.device.has_index() ? values.device.index() : 0));
  const Object stream(PyObject_CallOneArg(form.stream_of.get(), device.get()));
  if (!stream) return nullptr;
  config.stream = reinterpret_cast<void*>(PyLong_AsUnsignedLongLong(stream.get()));
  if (PyErr_Occurred()) return nullptr;
  int error;
  Py_BEGIN_ALLOW_THREADS;
  error = form.launch(&config, form.function, params.data(), nullptr);
  Py_END_ALLOW_THREADS;
  if (error) return PyErr_Format(PyExc_RuntimeError, "CUDA refuses the launch: error %d", error);
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

PyObject* cuda_kernel_new(PyTypeObject* type, PyObject* arguments, PyObject*) {
  HANDLE_TH_ERRORS
  unsigned long long launch, function;
  unsigned threads;
  const char *parameters, *device_type;
  PyObject* stream_of;
  if (!PyArg_ParseTuple(arguments, "KKIsOs", &launch, &function, &threads, &parameters, &stream_of,
                        &device_type))
    return nullptr;
  const std::string letters = parameters;
  if (letters.size() > MOST_ARGUMENTS || letters.find_first_not_of("pqif") != std::string::npos)
    return PyErr_Format(PyExc_ValueError, "parameters has to be letters of pqif, not %s",
                        parameters);
  auto form = std::make_unique<CudaForm>(
      CudaForm{reinterpret_cast<LaunchKernel>(launch), reinterpret_cast<void*>(function), threads,
               letters, Object::borrowed(stream_of), at::Device(device_type).type()});
  PyObject* self = type->tp_alloc(type, 0);
  if (!self) return nullptr;
  auto* kernel = reinterpret_cast<CudaKernel*>(self);
  kernel->call = cuda_kernel_call;
  kernel->form = form.release();
  return self;
  END_HANDLE_TH_ERRORS
}

void cuda_kernel_free(PyObject* self) {
  delete reinterpret_cast<CudaKernel*>(self)->form;
  Py_TYPE(self)->tp_free(self);
}

PyTypeObject cuda_kernel_type = {PyVarObject_HEAD_INIT(nullptr, 0)};

}  // namespace

bool add_cuda_kernel(PyObject* made) {
  cuda_kernel_type.tp_name = "lorafast.CudaKernel";
  cuda_kernel_type.tp_basicsize = sizeof(CudaKernel);
  cuda_kernel_type.tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL;
  cuda_kernel_type.tp_vectorcall_offset = offsetof(CudaKernel, call);
  cuda_kernel_type.tp_call = PyVectorcall_Call;
  cuda_kernel_type.tp_new = cuda_kernel_new;
  cuda_kernel_type.tp_dealloc = cuda_kernel_free;
  return PyModule_AddType(made, &cuda_kernel_type) == 0;
}

}  // namespace lorafast::launches
