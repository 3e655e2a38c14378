// What a lora.Linear of PEFT holds: its parts are read without Python's interpreter.
#pragma once

#include <Python.h>

#include <initializer_list>

namespace lorafast::host {

// The tensors and options of a call of one LoRA; references of its own. weight is as the base layer
// has it: [K,N] if transposed.
struct PeftCall {
  PyObject* weight = nullptr;
  PyObject* bias = nullptr;
  PyObject* A = nullptr;
  PyObject* B = nullptr;
  PyObject* lora_bias = nullptr;
  PyObject* scaling = nullptr;
  PyObject* dropout = nullptr;
  bool transposed = false;

  PeftCall() = default;
  ~PeftCall() {
    for (PyObject* held : {weight, bias, A, B, lora_bias, scaling, dropout}) Py_XDECREF(held);
  }
  PeftCall(const PeftCall&) = delete;
  PeftCall& operator=(const PeftCall&) = delete;
};

// Read the call that a layer would make now. False, with no exception set, if the layer has not one
// active LoRA alone or anything unusual: what usual_call of lorafast/integrations/peft_calls.py
// asks. The tensors themselves are not looked at.
//
// classes: torch.nn.Linear, transformers' Conv1D, torch.nn.Dropout and torch.nn.Identity. grad:
// gradients are recorded, without which hooks on them are never called.
bool read_peft_layer(PyObject* layer, PyObject* classes, bool grad, PeftCall& call);

}  // namespace lorafast::host
