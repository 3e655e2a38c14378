#include "recipe_backend.h"

#include <ATen/Context.h>
#include <ATen/ops/div.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/neg.h>

#include <bit>
#include <cstring>
#include <exception>

#include "cuda_forms.h"
#include "plans.h"
#include "python.h"

namespace lorafast::host {
namespace {

using at::Tensor;

const Tensor absent;

// p, of which a threshold is made again: probabilities are multiples of 1/65536.
double probability(const Drop& drop) { return drop.threshold / 65536.0; }
const Tensor& seed_of(const Drop& drop) { return drop.threshold ? drop.seed : absent; }

// a/b, 0 where b is 0: divide_or_zero of lorafast/engine/precision.py.
Tensor quotient_or_zero(const Tensor& a, const Tensor& b) {
  return at::div(a, b).masked_fill_(b.eq(0), 0);
}

// What of an operand decides how Python computes: its numbers are never read.
void add_operand(const Tensor& tensor, launches::Key& key) {
  if (!tensor.defined()) return key.add(0);
  const auto address = reinterpret_cast<uint64_t>(tensor.data_ptr());
  key.add(1 | static_cast<uint64_t>(tensor.scalar_type()) << 8 | address % 16 << 16 |
          static_cast<uint64_t>(tensor.dim()) << 24);
  for (const int64_t size : tensor.sizes()) key.add(static_cast<uint64_t>(size));
  for (const int64_t stride : tensor.strides()) key.add(static_cast<uint64_t>(stride));
}

}  // namespace

bool RecipeBackend::by_cuda(Primitive primitive) const {
  const auto own = primitive == Primitive::base_product ? Primitive::linear : primitive;
  return (plan >> (ROUTES + 2 * static_cast<int>(own)) & 3) == BY_CUDA;
}

std::vector<Tensor> RecipeBackend::compute(Primitive primitive,
                                           std::initializer_list<const Tensor*> operands,
                                           std::initializer_list<double> numbers) const {
  launches::Key key;
  key.add(static_cast<uint64_t>(primitive));
  // What else Python asks of torch.
  key.add(uint64_t{cuda::in_tf32()} | uint64_t{at::globalContext().userEnabledMkldnn()} << 1);
  for (const Tensor* operand : operands) add_operand(*operand, key);
  for (const double number : numbers) {
    uint64_t word;
    std::memcpy(&word, &number, sizeof word);
    key.add(word);
  }
  Entry entry;
  if (key.fits()) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (const auto found = entries.find(key.view()); found != entries.end()) entry = found->second;
  }
  if (entry.recipe) {
    bool holds;
    {
      const Gil held;
      holds = entry.recipe->holds();
    }
    std::vector<Tensor> results;
    if (holds && entry.recipe->run(operands, results)) return results;
  }
  // The first time may be the only one, and compiles kernels. What has had no recipe may have one
  // later, without a hook or the same tensor twice, and is asked ever more rarely.
  const bool asked = !entry.recipe && std::has_single_bit(entry.computed);
  return by_python(primitive, key, asked, operands, numbers);
}

std::vector<Tensor> RecipeBackend::by_python(Primitive primitive, const launches::Key& key,
                                             bool asked, c10::ArrayRef<const Tensor*> operands,
                                             c10::ArrayRef<double> numbers) const {
  auto [results, noted] =
      computed_by_python(plan, PRIMITIVES[static_cast<int>(primitive)], operands, numbers, asked);
  std::shared_ptr<const Recipe> recipe;
  if (noted) {
    const Gil held;
    try {
      recipe = std::make_shared<const Recipe>(noted, device);
    } catch (const std::exception&) {
      // What cannot be read is computed by Python each time.
      PyErr_Clear();
    }
    Py_DECREF(noted);
  }
  if (!key.fits()) return results;
  const std::lock_guard<std::mutex> lock(mutex);
  if (entries.size() >= MOST_RECIPES) entries.clear();
  const auto words = key.view();
  Entry& entry = entries[{words.begin(), words.end()}];
  ++entry.computed;
  if (recipe) entry.recipe = std::move(recipe);
  return results;
}

std::pair<Tensor, Tensor> RecipeBackend::project(const Tensor& x, const Tensor& A,
                                                 const Tensor& core, Drop drop) const {
  if (by_cuda(Primitive::project)) return cuda->project(x, A, core, drop);
  const auto made =
      compute(Primitive::project, {&x, &A, &core, &seed_of(drop)}, {probability(drop)});
  return {made[0], made[1]};
}

std::pair<Tensor, Tensor> RecipeBackend::linear(const Tensor& x, const Tensor& weight, const Up& up,
                                                const Gain& gain, const Tensor& bias,
                                                bool keep_inner) const {
  if (by_cuda(Primitive::linear)) return cuda->linear(x, weight, up, gain, bias, keep_inner);
  const auto made =
      compute(Primitive::linear, {&x, &weight, &up.h, &up.B, &up.scale, &gain.magnitude, &bias},
              {up.scaling, static_cast<double>(keep_inner)});
  return {made[0], made[1]};
}

Tensor RecipeBackend::base_product(const Tensor& x, const Tensor& weight) const {
  if (by_cuda(Primitive::base_product)) return cuda->base_product(x, weight);
  return compute(Primitive::base_product, {&x, &weight}, {})[0];
}

OutputGrads RecipeBackend::grad_output(const Tensor& dy, const OutputGradSpec& spec,
                                       const Gain& gain, const Tensor& kept, bool want_bias) const {
  if (by_cuda(Primitive::grad_output)) return cuda->grad_output(dy, spec, gain, kept, want_bias);
  const auto number = [](auto value) { return static_cast<double>(value); };
  const auto made =
      compute(Primitive::grad_output,
              {&dy, &spec.B, &spec.out_scale, &spec.core, &spec.h, &gain.magnitude, &kept},
              {spec.scaling, number(spec.frozen_columns), number(spec.want_v), number(spec.want_B),
               number(spec.want_core), number(spec.want_out_scale), number(want_bias)});
  return {made[0], made[1], made[2], made[3], made[4], made[5], {}, {}, {}};
}

Tensor RecipeBackend::grad_input(const Tensor& dy, const Tensor& weight, const Tensor& gain,
                                 const Tensor& v, const Tensor& A, Drop drop) const {
  if (by_cuda(Primitive::grad_input)) return cuda->grad_input(dy, weight, gain, v, A, drop);
  return compute(Primitive::grad_input, {&dy, &weight, &gain, &v, &A, &seed_of(drop)},
                 {probability(drop)})[0];
}

Tensor RecipeBackend::grad_project(const Tensor& x, const Tensor& v, Drop drop) const {
  if (by_cuda(Primitive::grad_project)) return cuda->grad_project(x, v, drop);
  return compute(Primitive::grad_project, {&x, &v, &seed_of(drop)}, {probability(drop)})[0];
}

Tensor RecipeBackend::drop(const Tensor& x, Drop drop) const {
  if (by_cuda(Primitive::drop)) return cuda->drop(x, drop);
  return compute(Primitive::drop, {&x, &drop.seed}, {probability(drop)})[0];
}

Tensor RecipeBackend::row_norm(const Tensor& weight, const Tensor& A, const Tensor& B,
                               double scaling, bool by_row) const {
  if (by_cuda(Primitive::row_norm)) return cuda->row_norm(weight, A, B, scaling, by_row);
  return compute(Primitive::row_norm, {&weight, &A, &B}, {scaling, static_cast<double>(by_row)})[0];
}

// A plan has its gains computed by one backend: those of project, linear and grad_output agree.
Tensor RecipeBackend::gain_of(const Tensor& magnitude, const Tensor& norm) const {
  if (by_cuda(Primitive::linear)) return cuda->gain_of(magnitude, norm);
  return quotient_or_zero(cast(magnitude, norm.scalar_type()), norm);
}

std::pair<Tensor, Tensor> RecipeBackend::gain_grads(const Tensor& d_gain, const Tensor& gain,
                                                    const Tensor& norm, bool by_gain,
                                                    bool want_norm) const {
  if (by_cuda(Primitive::linear)) return cuda->gain_grads(d_gain, gain, norm, by_gain, want_norm);
  const Tensor d_magnitude =
      quotient_or_zero(by_gain ? quotient_or_zero(d_gain, gain) : d_gain, norm);
  return {d_magnitude, want_norm ? at::mul(at::neg(d_magnitude), gain) : Tensor()};
}

}  // namespace lorafast::host
