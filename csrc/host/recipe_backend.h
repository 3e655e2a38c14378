// The `triton` backend, alone or beside others of a plan: Python computes each primitive of a
// problem and notes how, and what it has noted is repeated.
#pragma once

#include <initializer_list>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "../launch/key.h"
#include "backend.h"
#include "recipe.h"

namespace lorafast::host {

// The most recipes that are kept. Text of every length has its own.
constexpr size_t MOST_RECIPES = 8192;

// The primitives, in the order of a plan's routes and by their names in recipes.py.
enum class Primitive : uint8_t {
  project,
  linear,
  grad_output,
  grad_input,
  grad_project,
  row_norm,
  drop,
  base_product,
};
constexpr const char* PRIMITIVES[] = {"project",      "linear",   "grad_output", "grad_input",
                                      "grad_project", "row_norm", "drop",        "base_product"};

class RecipeBackend final : public Backend {
 public:
  // by_cuda: what computes the primitives that the plan leaves to the `cuda` backend.
  RecipeBackend(at::Device own, long number, const Backend* by_cuda)
      : device(own), plan(number), cuda(by_cuda) {}

  // As gain_of.
  bool divides() const override { return by_cuda(Primitive::linear); }
  std::pair<at::Tensor, at::Tensor> project(const at::Tensor& x, const at::Tensor& A,
                                            const at::Tensor& core, Drop drop) const override;
  std::pair<at::Tensor, at::Tensor> linear(const at::Tensor& x, const at::Tensor& weight,
                                           const Up& up, const Gain& gain, const at::Tensor& bias,
                                           bool keep_inner) const override;
  at::Tensor base_product(const at::Tensor& x, const at::Tensor& weight) const override;
  OutputGrads grad_output(const at::Tensor& dy, const OutputGradSpec& spec, const Gain& gain,
                          const at::Tensor& kept, bool want_bias) const override;
  at::Tensor grad_input(const at::Tensor& dy, const at::Tensor& weight, const at::Tensor& gain,
                        const at::Tensor& v, const at::Tensor& A, Drop drop) const override;
  at::Tensor grad_project(const at::Tensor& x, const at::Tensor& v, Drop drop) const override;
  at::Tensor drop(const at::Tensor& x, Drop drop) const override;
  at::Tensor row_norm(const at::Tensor& weight, const at::Tensor& A, const at::Tensor& B,
                      double scaling, bool by_row) const override;
  at::Tensor gain_of(const at::Tensor& magnitude, const at::Tensor& norm) const override;
  std::pair<at::Tensor, at::Tensor> gain_grads(const at::Tensor& d_gain, const at::Tensor& gain,
                                               const at::Tensor& norm, bool by_gain,
                                               bool want_norm) const override;

 private:
  // A problem. computed: how often Python has computed it.
  struct Entry {
    uint64_t computed = 0;
    std::shared_ptr<const Recipe> recipe;
  };

  bool by_cuda(Primitive primitive) const;
  std::vector<at::Tensor> compute(Primitive primitive,
                                  std::initializer_list<const at::Tensor*> operands,
                                  std::initializer_list<double> numbers) const;
  std::vector<at::Tensor> by_python(Primitive primitive, const launches::Key& key, bool asked,
                                    c10::ArrayRef<const at::Tensor*> operands,
                                    c10::ArrayRef<double> numbers) const;

  const at::Device device;
  const long plan;
  const std::unique_ptr<const Backend> cuda;
  mutable std::mutex mutex;
  mutable std::unordered_map<std::vector<uint64_t>, Entry, launches::KeyHash, launches::KeyEqual>
      entries;
};

}  // namespace lorafast::host
