#include "python.h"

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cstring>

namespace lorafast::host {

using at::Tensor;

Python python;

namespace {

[[noreturn]] void throw_python_error() {
  python_error error;
  error.persist();
  throw std::move(error);
}

PyObject* or_none(const Tensor& tensor) {
  if (tensor.defined()) return THPVariable_Wrap(tensor);
  return Py_NewRef(Py_None);
}

}  // namespace

BorrowedWeight::BorrowedWeight(PyObject* loan) {
  static PyObject* const take = PyUnicode_InternFromString("take");
  const Gil held;
  borrowed = PyObject_CallMethodNoArgs(loan, take);
  if (!borrowed) throw_python_error();
  weight = THPVariable_Unpack(PyTuple_GET_ITEM(borrowed, 0));
}

BorrowedWeight::~BorrowedWeight() {
  weight.reset();
  const Gil held;
  PyObject* done = PyObject_CallOneArg(python.give_back, borrowed);
  // A list takes one more item, or memory is out: the buffer is freed then.
  if (!done) PyErr_Clear();
  Py_XDECREF(done);
  Py_DECREF(borrowed);
}

const Kernels* cpu_kernels() {
  PyObject* capsule = PyObject_CallNoArgs(python.kernels);
  const void* found = capsule ? PyCapsule_GetPointer(capsule, Kernels::NAME) : nullptr;
  if (!found) throw python_error();
  // The module that they belong to is never unloaded.
  Py_DECREF(capsule);
  return static_cast<const Kernels*>(found);
}

std::vector<Tensor> backward_by_dispatcher(const Tensor& dy, const std::vector<Tensor>& saved,
                                           const Options& options, const std::vector<bool>& needs) {
  const Gil held;
  PyObject* tensors = PyTuple_New(static_cast<Py_ssize_t>(saved.size()));
  for (size_t i = 0; i < saved.size(); ++i)
    PyTuple_SET_ITEM(tensors, static_cast<Py_ssize_t>(i), or_none(saved[i]));
  PyObject* wanted = PyTuple_New(static_cast<Py_ssize_t>(needs.size()));
  for (size_t i = 0; i < needs.size(); ++i)
    PyTuple_SET_ITEM(wanted, static_cast<Py_ssize_t>(i), PyBool_FromLong(needs[i]));
  PyObject* grads =
      PyObject_CallFunction(python.backward, "NN(ddsssL)N", THPVariable_Wrap(dy), tensors,
                            options.scaling, options.dropout, axis_of(options),
                            dropout_on_of(options), KEEPS[static_cast<int>(options.keep)],
                            static_cast<long long>(options.frozen_columns), wanted);
  if (!grads) throw_python_error();
  std::vector<Tensor> result;
  for (Py_ssize_t i = 0; i < PyList_Size(grads); ++i) {
    PyObject* grad = PyList_GET_ITEM(grads, i);
    result.push_back(grad == Py_None ? Tensor() : THPVariable_Unpack(grad));
  }
  Py_DECREF(grads);
  return result;
}

void add_by_panels(const Tensor& start, const Tensor& a, const Tensor& b, const Tensor& out) {
  const Gil held;
  PyObject* done = PyObject_CallFunction(python.panels, "NNNN", or_none(start), or_none(a),
                                         or_none(b), or_none(out));
  if (!done) throw_python_error();
  Py_DECREF(done);
}

cuda::Function load_form(at::Device device, const cuda::Form& form) {
  const Gil held;
  PyObject* loaded =
      PyObject_CallFunction(python.load_form, "siiiis", cuda::STEMS[static_cast<int>(form.stem)],
                            cuda::dtype_number(form.dtype), form.tiles, form.flags,
                            static_cast<int>(form.tf32), device.str().c_str());
  if (!loaded) throw_python_error();
  unsigned long long launch, function;
  cuda::Function made;
  const char* parameters;
  const bool read =
      PyArg_ParseTuple(loaded, "KKIs", &launch, &function, &made.threads, &parameters);
  if (read) {
    made.launch = reinterpret_cast<launches::LaunchKernel>(launch);
    made.function = reinterpret_cast<void*>(function);
    made.parameters = parameters;
  }
  Py_DECREF(loaded);
  if (!read) throw_python_error();
  return made;
}

std::pair<std::vector<Tensor>, PyObject*> computed_by_python(long plan, const char* primitive,
                                                             c10::ArrayRef<const Tensor*> operands,
                                                             c10::ArrayRef<double> numbers,
                                                             bool asked) {
  const Gil held;
  PyObject* tensors = PyTuple_New(static_cast<Py_ssize_t>(operands.size()));
  for (size_t i = 0; i < operands.size(); ++i)
    PyTuple_SET_ITEM(tensors, static_cast<Py_ssize_t>(i), or_none(*operands[i]));
  PyObject* given = PyTuple_New(static_cast<Py_ssize_t>(numbers.size()));
  for (size_t i = 0; i < numbers.size(); ++i)
    PyTuple_SET_ITEM(given, static_cast<Py_ssize_t>(i), PyFloat_FromDouble(numbers[i]));
  PyObject* answer = PyObject_CallFunction(python.compute, "lsNNO", plan, primitive, tensors, given,
                                           asked ? Py_True : Py_False);
  PyObject *made, *noted;
  if (!answer || !PyArg_ParseTuple(answer, "O!O", &PyTuple_Type, &made, &noted)) {
    Py_XDECREF(answer);
    throw_python_error();
  }
  std::vector<Tensor> results;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(made); ++i) {
    PyObject* one = PyTuple_GET_ITEM(made, i);
    results.push_back(one == Py_None ? Tensor() : THPVariable_Unpack(one));
  }
  PyObject* recipe = noted == Py_None ? nullptr : Py_NewRef(noted);
  Py_DECREF(answer);
  return {std::move(results), recipe};
}

launches::TensorMap tensor_map(uint64_t address, PyObject* told) {
  const Gil held;
  PyObject* made = PyObject_CallFunction(python.tensor_map, "KO",
                                         static_cast<unsigned long long>(address), told);
  launches::TensorMap map;
  const bool is_map =
      made && PyBytes_Check(made) && PyBytes_GET_SIZE(made) == static_cast<Py_ssize_t>(sizeof map);
  if (is_map) std::memcpy(&map, PyBytes_AS_STRING(made), sizeof map);
  Py_XDECREF(made);
  if (!made) throw_python_error();
  TORCH_CHECK(is_map, "a tensor map has ", sizeof map, " bytes");
  return map;
}

std::string modified_words(const Tensor& weight, const Tensor& magnitude) {
  const Gil held;
  PyObject* words =
      PyObject_CallFunction(python.modified, "NN", or_none(weight), or_none(magnitude));
  const char* text = words ? PyUnicode_AsUTF8(words) : nullptr;
  if (!text) throw_python_error();
  std::string result = text;
  Py_DECREF(words);
  return result;
}

}  // namespace lorafast::host
