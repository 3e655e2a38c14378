// A recipe: what a primitive of one problem allocates, computes by torch and launches, in order, as
// lorafast/engine/recipes.py notes it while Python computes the primitive.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <Python.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <variant>
#include <vector>

#include "../launch/cuda_driver.h"

namespace lorafast::host {

// The most tensor maps of a descriptor that are kept, one for each address.
constexpr size_t MOST_MAPS = 1024;

class Recipe {
 public:
  // noted: what recipes.py made of a problem on a device. Throws python_error for anything else.
  // The GIL is held.
  Recipe(PyObject* noted, at::Device own);
  ~Recipe();
  Recipe(const Recipe&) = delete;
  Recipe& operator=(const Recipe&) = delete;

  // True if nothing that Python looks at before a launch has changed. The GIL is held.
  bool holds() const;

  // Compute the results of other operands of the same problem. An operand, and a result, that is
  // absent is undefined. False if the driver has refused a launch: nothing has been computed then.
  bool run(c10::ArrayRef<const at::Tensor*> operands, std::vector<at::Tensor>& results) const;

 private:
  // The tensors, by slot: the operands, and then what is allocated or computed.
  using Slots = c10::SmallVector<at::Tensor, 32>;

  // A slot, or a view of it.  slot: -1 for none; offset: in bytes
  struct View {
    int slot = -1;
    int64_t offset = 0;
    bool whole = true;
    std::vector<int64_t> sizes, strides;
    caffe2::TypeMeta dtype;

    View() = default;
    explicit View(PyObject* noted);
    at::Tensor of(const Slots& slots) const;
  };

  struct Allocation {
    int slot;
    bool is_contiguous;
    std::vector<int64_t> sizes, strides;
    at::TensorOptions options;
  };

  // values: those of its arguments that are no tensors of the slots. made: the slot of each result,
  // -1 for one that has a slot.
  struct Operation {
    c10::OperatorHandle function;
    std::vector<c10::IValue> values;
    std::vector<std::pair<size_t, View>> tensors;
    std::vector<std::pair<size_t, std::vector<View>>> lists;
    std::vector<int> made;
  };

  // The tensor maps of a descriptor, by the address of its tensor. told: what Python makes one of.
  struct Maps {
    PyObject* told;
    mutable std::mutex mutex;
    mutable std::unordered_map<uint64_t, launches::TensorMap> known;

    explicit Maps(PyObject* own) : told(own) {}
    launches::TensorMap at(uint64_t address) const;
  };

  // A parameter of a kernel: a number, or the address of a slot and so many bytes, or a tensor map
  // of it.
  struct Parameter {
    int slot = -1;
    uint64_t value = 0;
    std::unique_ptr<Maps> maps;
  };

  struct Launch {
    void* function;
    launches::LaunchConfig config;
    std::vector<Parameter> parameters;
    size_t maps = 0;
  };

  // last: the slots that no later step reads.
  struct Step {
    std::variant<Allocation, Operation, Launch> what;
    std::vector<int> last;
  };

  Allocation read_allocation(PyObject* noted) const;
  Operation read_operation(PyObject* noted) const;
  Launch read_launch(PyObject* noted) const;
  void find_last();
  bool run_launch(const Launch& step, const Slots& slots) const;

  at::Device device;
  launches::LaunchKernel driver_launch = nullptr;
  size_t operand_count = 0, slot_count = 0;
  std::vector<Step> steps;
  std::vector<View> results_from;
  // Everything of Python that the steps refer to; what has to be as it was, in triples of an object
  // or a dict, a name, and what is found there, None for anything false.
  PyObject* noted;
  PyObject* watched = nullptr;
};

}  // namespace lorafast::host
