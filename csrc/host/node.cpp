#include "node.h"

#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/intrusive_ptr.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <exception>
#include <optional>

#include "observers.h"
#include "python.h"

namespace lorafast::host {
namespace {

using at::Tensor;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// The saved tensors, in the order of linear_backward's arguments after dy: x, h, kept, and the
// fields of LayerTensors.
enum Slot : int {
  SAVED_X,
  SAVED_H,
  SAVED_KEPT,
  SAVED_WEIGHT,
  SAVED_M = SAVED_WEIGHT + 5,
  SLOTS = SAVED_WEIGHT + 11,
};

// What the operations inside a call must not reach: autograd, which has its node already, and
// autocast, which would cast the sums.
const c10::DispatchKeySet ABOVE =
    c10::autograd_dispatch_keyset_with_ADInplaceOrView | c10::autocast_dispatch_keyset;

// The device that has to be the current one while a tensor is computed with; none for a CPU.
std::optional<at::Device> guarded(const Tensor& tensor) {
  return tensor.is_cpu() ? std::nullopt : std::optional(tensor.device());
}

struct LinearBackward : torch::autograd::Node {
  const Backend* backend = nullptr;
  Options options;
  Needs needs{};
  std::array<SavedVariable, SLOTS> saved;
  // y and how often it had been written, for Keep::output.
  c10::weak_intrusive_ptr<c10::TensorImpl> output{c10::intrusive_ptr<c10::TensorImpl>()};
  uint32_t output_version = 0;
  bool traced = false;
  // From which the weight is taken, where none is saved.
  PyObject* loan = nullptr;

  ~LinearBackward() override {
    if (!loan) return;
    const Gil held;
    Py_DECREF(loan);
  }

  std::string name() const override { return "_LinearBackward"; }

  void release_variables() override {
    PyObject* returned = nullptr;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (SavedVariable& variable : saved) variable.reset_data();
      std::swap(returned, loan);
    }
    // After the lock, which a thread with the GIL may wait for.
    if (!returned) return;
    const Gil held;
    Py_DECREF(returned);
  }

  // What compiled autograd specialises its graph on, and the tensors that it lifts into it.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    TORCH_CHECK(!loan, "compiled autograd would keep the dequantised weight of a quantised layer");
    for (int i = 0; i < SLOTS; ++i)
      args.collect(saved[i], i == SAVED_KEPT && options.keep == Keep::output);
    for (const bool need : needs) args.collect(need);
    for (const double number : {options.scaling, options.dropout}) args.collect(number);
    for (const int64_t number : {static_cast<int64_t>(options.keep), int64_t{options.in_axis},
                                 int64_t{options.on_both}, options.frozen_columns})
      args.collect(number);
  }

  variable_list apply_with_saved(const variable_list& incoming,
                                 torch::dynamo::autograd::SwapSavedVariables& swapped) override {
    for (SavedVariable& variable : saved) swapped.before(variable);
    // Stand-ins have versions of their own; compiled_args has unpacked the tensors themselves.
    traced = true;
    variable_list grads = apply(variable_list(incoming));
    traced = false;
    for (SavedVariable& variable : saved) swapped.after(variable);
    return grads;
  }

  variable_list apply(variable_list&& incoming) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::array<Tensor, SLOTS> kept = unpacked();
    std::optional<BorrowedWeight> borrowed;
    if (loan) kept[SAVED_WEIGHT] = borrowed.emplace(loan).weight;
    Tensor dy = std::move(incoming[0]);
    if (!dy.defined()) dy = input_metadata(0).zeros_like();
    if (at::GradMode::is_enabled() || observers_active() || !is_plain(dy) || !all_plain(kept))
      return backward_by_dispatcher(dy, variable_list(kept.begin(), kept.end()), options,
                                    std::vector<bool>(needs.begin(), needs.end()));
    const c10::OptionalDeviceGuard current(guarded(dy));
    const c10::impl::ExcludeDispatchKeyGuard below(ABOVE);
    const Tensor* t = &kept[SAVED_WEIGHT];
    const Tensors tensors{t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7], t[8], t[9], t[10]};
    Grads grads = backward(*backend, dy, kept[SAVED_X], kept[SAVED_H], kept[SAVED_KEPT], tensors,
                           options, needs);
    return {std::make_move_iterator(grads.begin()), std::make_move_iterator(grads.end())};
  }

 private:
  static bool all_plain(const std::array<Tensor, SLOTS>& tensors) {
    for (const Tensor& tensor : tensors)
      if (tensor.defined() && !is_plain(tensor)) return false;
    return true;
  }

  // The saved tensors, if y is as forward left it wherever it is one of them.
  std::array<Tensor, SLOTS> unpacked() {
    const auto self = getptr();
    std::array<Tensor, SLOTS> tensors;
    const bool checks = options.keep == Keep::output && !traced;
    std::exception_ptr failure;
    bool in_place = false;
    for (int i = 0; i < SLOTS; ++i) {
      try {
        tensors[i] = saved[i].unpack(self);
      } catch (const c10::Error& error) {
        if (!checks || i != SAVED_KEPT) throw;
        failure = std::current_exception();
        in_place = std::string(error.what()).find("inplace") != std::string::npos;
      }
    }
    if (!checks) return tensors;
    const auto alive = output.lock();
    bool modified = alive && alive->version_counter().current_version() != output_version;
    // A y that has been freed has no version to compare, but is the likeliest cause.
    if (failure && !modified && !(in_place && !alive)) std::rethrow_exception(failure);
    // Under hooks on saved tensors torch itself checks nothing.
    modified |= failure || tensors[SAVED_KEPT]._version() != output_version;
    if (modified) throw std::runtime_error(modified_words(tensors[SAVED_WEIGHT], tensors[SAVED_M]));
    return tensors;
  }
};

}  // namespace

Outputs computed(const Backend& backend, const Tensor& x, const Tensors& tensors,
                 const Options& options) {
  const WithoutGil released;
  const c10::OptionalDeviceGuard current(guarded(x));
  const c10::impl::ExcludeDispatchKeyGuard below(ABOVE);
  return forward(backend, x, tensors, options);
}

Tensor detached_norm(const Backend& backend, const Tensors& tensors, const Options& options) {
  const WithoutGil released;
  const c10::OptionalDeviceGuard current(guarded(tensors.weight));
  const c10::impl::ExcludeDispatchKeyGuard below(ABOVE);
  return norm_of(backend, tensors, options);
}

Tensor recorded(const Backend& backend, const Tensor& x, const Tensors& tensors,
                const Options& options, PyObject* loan) {
  const std::array<const Tensor*, GRADS> inputs{&x,
                                                &tensors.bias,
                                                &tensors.A,
                                                &tensors.B,
                                                &tensors.core,
                                                &tensors.magnitude,
                                                &tensors.norm,
                                                &tensors.out_scale,
                                                &tensors.lora_bias};
  auto node = c10::make_intrusive<LinearBackward>();
  torch::autograd::edge_list edges;
  edges.reserve(GRADS);
  for (int i = 0; i < GRADS; ++i) {
    node->needs[i] = inputs[i]->defined() && inputs[i]->requires_grad();
    edges.push_back(node->needs[i] ? torch::autograd::impl::gradient_edge(*inputs[i])
                                   : torch::autograd::Edge());
  }
  node->set_next_edges(std::move(edges));
  node->backend = &backend;
  node->options = options;
  node->loan = Py_XNewRef(loan);
  const auto [y, h, z] = computed(backend, x, tensors, options);
  torch::autograd::set_history(y, node);
  const Saved saved = saved_for(node->needs, options, tensors.magnitude.defined());
  const auto save = [&](int slot, const Tensor& tensor, bool is_output = false) {
    if (tensor.defined()) node->saved[slot] = SavedVariable(tensor, is_output);
  };
  if (saved.x) save(SAVED_X, x);
  if (saved.h) save(SAVED_H, h);
  if (saved.y) save(SAVED_KEPT, y, true);
  if (saved.z) save(SAVED_KEPT, z);
  int slot = SAVED_WEIGHT;
  save(slot++, loan ? Tensor() : tensors.weight);
  // Backward reads the biases only to correct Σ dy⊙kept; elsewhere they may change before it.
  save(slot++, saved.y ? tensors.bias : Tensor());
  for (const Tensor* tensor : {&tensors.A, &tensors.B, &tensors.core, &tensors.magnitude,
                               &tensors.norm, &tensors.out_scale})
    save(slot++, *tensor);
  save(slot++, saved.z || options.keep == Keep::recompute ? tensors.lora_bias : Tensor());
  save(slot++, tensors.seed);
  save(slot++, tensors.scale);
  if (options.keep == Keep::output) {
    node->output = c10::weak_intrusive_ptr<c10::TensorImpl>(y.getIntrusivePtr());
    node->output_version = y._version();
  }
  return y;
}

}  // namespace lorafast::host
