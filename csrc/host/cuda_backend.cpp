#include "cuda_backend.h"

#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>

#include "cuda_decode.h"
#include "cuda_grad_output.h"
#include "cuda_kernels.h"

namespace lorafast::host {
namespace {

using at::Tensor;

// An uninitialised activation [...,width] beside another.
Tensor activation(const Tensor& like, int64_t width) {
  auto sizes = like.sizes().vec();
  sizes.back() = width;
  return cuda::empty(like, sizes, like.scalar_type());
}

// The operands of (gain⊙dy) W in dy's dtype, the gain rounded into the smaller one: that of
// lorafast/engine/backends/eager.py.
std::pair<Tensor, Tensor> cuda_gained_operands(const Tensor& dy, const Tensor& given,
                                               const Tensor& gain) {
  const Tensor dy2 = cuda::flatten_tokens(dy), weight = cast(given, dy2.scalar_type());
  if (!gain.defined()) return {dy2, weight};
  const bool smaller = dy2.size(0) < weight.size(1);
  Tensor scaled = at::empty_like(smaller ? dy2 : weight);
  at::mul_out(scaled, smaller ? dy2 : weight, smaller ? gain : gain.unsqueeze(1));
  return smaller ? std::pair{scaled, weight} : std::pair{dy2, scaled};
}

// out = (out if started) + a b in place.
void add_product(Tensor out, const Tensor& a, const Tensor& b, bool started) {
  if (started)
    out.addmm_(a, b);
  else
    at::mm_out(out, a, b);
}

}  // namespace

std::pair<Tensor, Tensor> CudaBackend::project(const Tensor& x, const Tensor& A, const Tensor& core,
                                               Drop drop) const {
  return cuda::project(device, cuda::flatten_tokens(x), A, core, drop, x.scalar_type());
}

std::pair<Tensor, Tensor> CudaBackend::linear(const Tensor& x, const Tensor& given, const Up& up,
                                              const Gain& gain, const Tensor& bias,
                                              bool keep_inner) const {
  const Tensor x2 = cuda::flatten_tokens(x), weight = cast(given, x.scalar_type());
  const Tensor y = activation(x, weight.size(0)), y2 = y.view({x2.size(0), weight.size(0)});
  const Tensor none, z = gain.defined() && keep_inner ? at::empty_like(y2) : none;
  if (cuda::decode_serves(x2, weight, up)) {
    cuda::decode(device, y2, x2, weight, up, gain, bias, z);
    return {y, z};
  }
  const bool started = !gain.defined();
  // The product comes last, so that the sum is rounded once; and the kernel reads no y.
  if (!started) add_product(y2, x2, weight.t(), false);
  cuda::low_rank_add(device, y2,
                     {up.h, up.B, {none}, !started, up.scaling, up.scale, gain, bias, z});
  if (started) add_product(y2, x2, weight.t(), true);
  return {y, z};
}

Tensor CudaBackend::base_product(const Tensor& x, const Tensor& given) const {
  const Tensor x2 = cuda::flatten_tokens(x), weight = cast(given, x.scalar_type());
  const Tensor y = activation(x, weight.size(0));
  add_product(y.view({x2.size(0), weight.size(0)}), x2, weight.t(), false);
  return y;
}

OutputGrads CudaBackend::grad_output(const Tensor& dy, const OutputGradSpec& spec, const Gain& gain,
                                     const Tensor& kept, bool want_bias) const {
  const Tensor kept2 = kept.defined() ? cuda::flatten_tokens(kept) : kept;
  return cuda::grads_of(device, cuda::flatten_tokens(dy), spec, gain, kept2, want_bias);
}

Tensor CudaBackend::grad_input(const Tensor& dy, const Tensor& weight, const Tensor& gain,
                               const Tensor& v, const Tensor& A, Drop drop) const {
  const Tensor dx = activation(dy, weight.size(1)), dx2 = cuda::flatten_tokens(dx);
  if (v.defined()) {
    const Tensor none;
    cuda::low_rank_add(device, dx2, {v, A.t(), drop, false, 1, none, {}, none, none});
  }
  const auto [a, b] = cuda_gained_operands(dy, weight, gain);
  add_product(dx2, a, b, v.defined());
  return dx;
}

Tensor CudaBackend::grad_project(const Tensor& x, const Tensor& v, Drop drop) const {
  return cuda::grad_project(device, cuda::flatten_tokens(x), v, drop);
}

Tensor CudaBackend::drop(const Tensor& x, Drop drop) const {
  const Tensor out = cuda::empty(x, x.sizes(), x.scalar_type()), x2 = cuda::flatten_tokens(x);
  cuda::drop_into(device, out.view(x2.sizes()), x2, drop);
  return out;
}

Tensor CudaBackend::row_norm(const Tensor& weight, const Tensor& A, const Tensor& B, double scaling,
                             bool by_row) const {
  return cuda::row_norm(device, weight, A, B, scaling, by_row);
}

Tensor CudaBackend::gain_of(const Tensor& magnitude, const Tensor& norm) const {
  const Tensor none;
  return cuda::quotient(device, magnitude, none, norm, none).first;
}

std::pair<Tensor, Tensor> CudaBackend::gain_grads(const Tensor& d_gain, const Tensor& gain,
                                                  const Tensor& norm, bool by_gain,
                                                  bool want_norm) const {
  const Tensor none;
  return cuda::quotient(device, d_gain, by_gain ? gain : none, norm, want_norm ? gain : none);
}

}  // namespace lorafast::host
