// What a launch is given, and the key by which its compiled kernel is kept.
#pragma once

#include <ATen/core/Tensor.h>
#include <Python.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "cuda_driver.h"
#include "key.h"

namespace lorafast::launches {

// A reference to an object of Python.
class Object {
 public:
  Object() = default;
  explicit Object(PyObject* own) : pointer(own) {}
  static Object borrowed(PyObject* other) { return Object(Py_XNewRef(other)); }
  Object(Object&& other) noexcept : pointer(std::exchange(other.pointer, nullptr)) {}
  Object& operator=(Object&& other) noexcept {
    std::swap(pointer, other.pointer);
    return *this;
  }
  ~Object() { Py_XDECREF(pointer); }

  PyObject* get() const { return pointer; }
  explicit operator bool() const { return pointer; }

 private:
  PyObject* pointer = nullptr;
};

constexpr size_t MOST_ARGUMENTS = 64, MOST_FLAGS = 8, MOST_DESCRIPTORS = 16, MOST_DIMS = 5;
// The most kernels, and the most descriptors, that are kept. A size of a new value adds a kernel.
constexpr size_t MOST_KERNELS = 4096, MOST_KEPT_DESCRIPTORS = 8192;

// The kinds of a kernel's parameters. A number is read at the address of its 8 bytes, and the bytes
// of a smaller one come first.
enum class Kind : uint8_t { NUMBER, DESCRIPTOR };

struct Param {
  Kind kind;
  uint8_t argument;
  // What Triton says about a descriptor: an object that stands for itself, kept by the kernel.
  PyObject* meta;
};

struct Kernel {
  void* function;
  unsigned threads, shared;
  std::vector<Param> params;
  // Everything of Python that the key and the parameters refer to.
  Object references;
};

// A descriptor that has been launched with. It is never changed (launch.descriptor makes them).
struct Descriptor {
  Object self;
  std::vector<uint64_t> key;
  std::vector<int64_t> shape, strides;
  // Its tensor maps, by what Triton said about them.
  std::vector<std::pair<Object, TensorMap>> maps;
};

// One launch: what was given, the key it has, and the values of its parameters.
struct Call {
  PyObject* kernel;
  Key key;
  int64_t grid[3] = {1, 1, 1};
  size_t count = 0;
  std::array<uint64_t, MOST_ARGUMENTS> values;
  std::array<PyObject*, MOST_ARGUMENTS> arguments;
};

struct State {
  // The function of Python that makes all other launches, and the one that makes a tensor map.
  Object slow, encode;
  // Pairs of an object and the name of an attribute, and what that has to be; null: anything false.
  std::vector<std::tuple<Object, Object, Object>> watched;
  // The name of what has to be false of a kernel, and Triton's config of drivers.
  Object kernel_watched, drivers;
  Object descriptor_type;
  LaunchKernel launch = nullptr;
  at::DeviceType device_type = at::DeviceType::CUDA;

  // The driver that launches now, and what it is asked.
  Object driver, current_device, current_stream;
  // By kernel, for each argument: 1 if Triton compiles for its value.
  std::unordered_map<PyObject*, std::pair<Object, std::string>> declared;
  std::unordered_map<std::vector<uint64_t>, std::shared_ptr<const Kernel>, KeyHash, KeyEqual>
      kernels;
  std::unordered_map<PyObject*, Descriptor> descriptors;
};

// The value of an int of Python; false for anything else and for what has more than 64 bits.
bool read_int(PyObject* object, int64_t& value);

// The entry of a descriptor, null for one that is unusual. Another thread of Python may remove it.
const Descriptor* descriptor_of(State& state, PyObject* object);

// Read a launch: the kernel, the grid, the tile and the arguments; the flags follow, with their
// names. False for what no kernel is kept for: an exception of Python may be set then.
bool read_call(State& state, PyObject* const* given, size_t count, PyObject* names, Call& call,
               Object& device);

}  // namespace lorafast::launches
