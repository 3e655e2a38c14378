// The `cpu` backend: the twins of the functions of lorafast/engine/backends/cpu.py, operation by
// operation, so that both give the same bits.
#pragma once

#include "../cpu/kernels.h"
#include "backend.h"

namespace lorafast::host {

// What a plan says of the products of the `cpu` backend, as lorafast/engine/host.py numbers it.
enum CpuPlan : long {
  ONEDNN_BIAS = 2,  // oneDNN has a bf16 product with a bias
  Y_ALONG = 4,      // x Wᵀ goes by panels in fp32 if the numbers summed lie side by side in W,
  Y_ACROSS = 8,     // or if they do not
  DX_ALONG = 16,    // so does dy W
  DX_ACROSS = 32,
  ONE_KERNEL = 256,  // one kernel computes y where the rows of W are dense
};

// kernels: the compiled ones. plan: flags of CpuPlan.
class CpuBackend final : public Backend {
 public:
  CpuBackend(const Kernels* compiled, long flags) : kernels(compiled), plan(flags) {}

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

  const Kernels* const kernels;
  const long plan;

 private:
  at::Tensor product(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) const;
  at::Tensor one_kernel(const at::Tensor& x, const at::Tensor& weight, const Up* up,
                        const at::Tensor& gain, const at::Tensor& bias,
                        const at::Tensor& inner) const;
};

}  // namespace lorafast::host
