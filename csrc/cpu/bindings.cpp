// The Python module: the entry points of kernels.h, in Python's own C interface. A library for
// bindings would take a quarter of the time of the whole build.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <exception>
#include <limits>
#include <new>
#include <tuple>
#include <type_traits>
#include <utility>

#include "kernels.h"
#include "module_name.h"
#include "vector.h"
#include "workspace.h"

namespace lorafast {
namespace {

// Reads arguments until one does not fit; a Python error is set then.
class ArgumentReader {
 public:
  template <class T>
  T read(PyObject* object) {
    if (failed) return T{};
    if constexpr (std::is_same_v<T, float>) {
      const double value = PyFloat_AsDouble(object);
      failed = value == -1 && PyErr_Occurred();
      return static_cast<float>(value);
    } else if constexpr (std::is_same_v<T, bool>) {
      const int value = PyObject_IsTrue(object);
      failed = value < 0;
      return value > 0;
    } else {
      using Widest = std::conditional_t<std::is_unsigned_v<T>, unsigned long long, long long>;
      Widest value;
      if constexpr (std::is_unsigned_v<T>)
        value = PyLong_AsUnsignedLongLong(object);
      else
        value = PyLong_AsLongLong(object);
      failed = value == static_cast<Widest>(-1) && PyErr_Occurred();
      if (!failed &&
          (value < std::numeric_limits<T>::min() || value > std::numeric_limits<T>::max())) {
        PyErr_SetString(PyExc_OverflowError, "the number is too large for its argument");
        failed = true;
      }
      return static_cast<T>(value);
    }
  }

  bool failed = false;
};

// Other threads of Python run while it lives.
class ReleasedGil {
 public:
  ReleasedGil() : state(PyEval_SaveThread()) {}
  ~ReleasedGil() { PyEval_RestoreThread(state); }
  ReleasedGil(const ReleasedGil&) = delete;
  ReleasedGil& operator=(const ReleasedGil&) = delete;

 private:
  PyThreadState* state;
};

// A C++ function as a function of Python.
template <auto function>
struct Bound;

template <class Result, class... Arguments, Result (*function)(Arguments...)>
struct Bound<function> {
  static PyObject* call(PyObject*, PyObject* const* given, Py_ssize_t count) {
    if (count != static_cast<Py_ssize_t>(sizeof...(Arguments)))
      return PyErr_Format(PyExc_TypeError, "takes %zu arguments, not %zd", sizeof...(Arguments),
                          count);
    return call_with(given, std::index_sequence_for<Arguments...>{});
  }

 private:
  template <size_t... i>
  static PyObject* call_with(PyObject* const* given, std::index_sequence<i...>) {
    ArgumentReader reader;
    // Braces, unlike parentheses, read from left to right.
    const std::tuple<Arguments...> arguments{reader.read<Arguments>(given[i])...};
    if (reader.failed) return nullptr;
    try {
      if constexpr (std::is_void_v<Result>) {
        run(arguments);
        Py_RETURN_NONE;
      } else {
        const Result result = run(arguments);
        if constexpr (std::is_same_v<Result, bool>) return PyBool_FromLong(result);
        return PyLong_FromLongLong(result);
      }
    } catch (const std::bad_alloc&) {
      return PyErr_NoMemory();
    } catch (const std::exception& error) {
      PyErr_SetString(PyExc_RuntimeError, error.what());
      return nullptr;
    }
  }

  static Result run(const std::tuple<Arguments...>& arguments) {
    const ReleasedGil released;
    return std::apply(function, arguments);
  }
};

template <auto function>
PyMethodDef method(const char* name) {
  // METH_FASTCALL says that the function has this other signature.
  const auto call = reinterpret_cast<void (*)()>(&Bound<function>::call);
  return {name, reinterpret_cast<PyCFunction>(call), METH_FASTCALL, nullptr};
}

PyMethodDef methods[] = {
    method<&Workspace::largest>("largest_workspace"),
    method<&entries::project>("project"),
    method<&entries::low_rank_add>("low_rank_add"),
    method<&entries::grad_project>("grad_project"),
    method<&entries::grad_output>("grad_output"),
    method<&entries::row_norm>("row_norm"),
    method<&entries::linear>("linear"),
    method<&entries::drop>("drop"),
    method<&entries::drop_mask>("drop_mask"),
    method<&entries::scale>("scale"),
    method<&entries::dequantise_4bit>("dequantise_4bit"),
    method<&entries::grouped_project>("grouped_project"),
    method<&entries::grouped_low_rank_add>("grouped_low_rank_add"),
    method<&entries::grouped_grad_project>("grouped_grad_project"),
    method<&entries::grouped_grad_output>("grouped_grad_output"),
    {},
};

Kernels kernels = {
    &entries::project,  &entries::low_rank_add, &entries::grad_project, &entries::grad_output,
    &entries::row_norm, &entries::linear,       &entries::scale,        &entries::drop,
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, LORAFAST_TEXT_OF(LORAFAST_MODULE), nullptr, -1,
                      methods};

}  // namespace
}  // namespace lorafast

PyMODINIT_FUNC LORAFAST_INIT_OF(LORAFAST_MODULE)() {
  PyObject* made = PyModule_Create(&lorafast::module);
  if (!made) return nullptr;
  PyObject* table = PyCapsule_New(&lorafast::kernels, lorafast::Kernels::NAME, nullptr);
  const bool added = PyModule_AddStringConstant(made, "ISA", lorafast::ISA) == 0 && table &&
                     PyModule_AddObjectRef(made, "kernels", table) == 0;
  Py_XDECREF(table);
  if (!added) Py_CLEAR(made);
  return made;
}
