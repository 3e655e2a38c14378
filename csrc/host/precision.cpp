#include "precision.h"

#include <ATen/ops/frexp.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/ldexp.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/rsub.h>
#include <ATen/ops/sub.h>
#include <ATen/ops/where.h>

#include <limits>

namespace lorafast::host {

using at::Tensor;

Tensor apply_core(const Tensor& h, const Tensor& core) {
  if (!core.defined()) return h;
  if (core.dim() == 1) return at::mul(h, cast(core, h.scalar_type()));
  return at::linear(h, cast(core, h.scalar_type()));
}

std::pair<Tensor, Tensor> scaled_to_fp16(const Tensor& tensor) {
  if (!tensor.numel())
    return {tensor.to(at::kHalf), at::ones({}, tensor.options().dtype(at::kFloat))};
  const Tensor largest =
      at::linalg_vector_norm(cast(tensor, at::kFloat), std::numeric_limits<double>::infinity());
  // A power of two within fp32's range, and none for inf and nan, which stay what they are.
  const Tensor exponent =
      at::where(at::isfinite(largest), std::get<1>(at::frexp(largest)), 0).clamp_(-100, 100);
  const Tensor one = at::ones_like(largest);
  const Tensor scaled = at::mul(tensor, at::ldexp(one, at::rsub(exponent, 14)));
  return {scaled.to(at::kHalf), at::ldexp(one, at::sub(exponent, 14))};
}

}  // namespace lorafast::host
