// The `cuda` backend: the twins of the functions of lorafast/engine/backends/cuda.py, launch by
// launch.
#pragma once

#include "backend.h"
#include "cuda_forms.h"

namespace lorafast::host {

class CudaBackend final : public Backend {
 public:
  CudaBackend(at::Device own, int64_t multiprocessors) : device(own, multiprocessors) {}

  bool divides() const override { return true; }
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
  const cuda::Device device;
};

}  // namespace lorafast::host
