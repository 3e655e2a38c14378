#include "cpu_backend.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/div.h>
#include <ATen/ops/eq.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/masked_fill.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/neg.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>

#include "cpu_operands.h"
#include "onednn.h"
#include "precision.h"
#include "python.h"

namespace lorafast::host {
namespace {

using at::Tensor;

// As lorafast/engine/backends/cpu.py has them, with the reasons.
constexpr int64_t SMALL = 1 << 22;
constexpr int64_t AMX_ROW = 32;
// As lorafast/engine/row_blocks.py has it.
constexpr int64_t BLOCK_ELEMENTS = 1 << 19;

// What low_rank_add is given, prepared before the product that makes its output.
struct Addition {
  Tensor h, factor;
  // The side of the factor that R is: 1 for B [N,R], 0 for A [R,K].
  int rank_side = 0;
  double scaling = 1;
  Tensor scale = {}, gain = {}, bias = {};
};

Addition prepared(const Tensor& h, const Tensor& factor, int rank_side) {
  return {h.stride(1) == 1 ? h : h.contiguous(), in_kernel_type(factor), rank_side};
}

// out = gain⊙(out + mask⊙(h (scaling·scale⊙factor)ᵀ)) + bias. out is dense.
void low_rank_add(const CpuBackend& backend, const Addition& addition, const Drop& drop,
                  const Tensor& inner, const Tensor& out) {
  const auto& [h, factor, rank_side, scaling, scale, gain, bias] = addition;
  const int64_t M = h.size(0), R = h.size(1), N = factor.size(1 - rank_side);
  backend.kernels->low_rank_add(
      type_of(out), type_of(h), address(h), M, h.stride(0), N, R, address(factor), type_of(factor),
      factor.stride(rank_side), factor.stride(1 - rank_side), static_cast<float>(scaling),
      address(scale), seed_address(drop), drop.threshold, address(gain), address(bias),
      address_of_output(inner), threads(M * N * R), address_of_output(out));
}

// h = drop(x) factorᵀ and h' = h coreᵀ for a matrix core.  x2 [M,K] with dense rows
std::pair<Tensor, Tensor> project_rows(const CpuBackend& backend, const Tensor& x2,
                                       const Tensor& given, const Tensor& core, const Drop& drop) {
  const int64_t M = x2.size(0), K = x2.size(1), R = given.size(0);
  const Tensor factor = in_kernel_type(given);
  Tensor h = empty({M, R}, x2.scalar_type()), h_core = h, matrix;
  if (core.defined() && core.dim() == 2) {
    matrix = in_kernel_type(core);
    h_core = empty({M, R}, x2.scalar_type());
  }
  const bool has_core = matrix.defined();
  backend.kernels->project(type_of(x2), address(x2), M, K, x2.stride(0), R, address(factor),
                           type_of(factor), factor.stride(0), factor.stride(1), seed_address(drop),
                           drop.threshold, address_of_output(h), address(matrix),
                           has_core ? type_of(matrix) : 0, has_core ? matrix.stride(0) : 0,
                           has_core ? matrix.stride(1) : 0,
                           has_core ? address_of_output(h_core) : 0, threads(M * K * R));
  return {h, h_core};
}

Tensor grad_project_rows(const CpuBackend& backend, const Tensor& x2, const Tensor& given,
                         const Drop& drop) {
  const Tensor v = dense_rows(cast(given, low_rank_grad_dtype(x2.scalar_type())));
  const int64_t M = x2.size(0), K = x2.size(1), R = v.size(1);
  Tensor out = empty({R, K}, at::kFloat);
  backend.kernels->grad_project(type_of(x2), address(x2), M, K, x2.stride(0), address(v), R,
                                v.stride(0), seed_address(drop), drop.threshold,
                                address_of_output(out), threads(M * K * R));
  return out;
}

// gain⊙x with one gain for each row, or for each column.
Tensor scale(const CpuBackend& backend, const Tensor& given, const Tensor& gain, bool by_row) {
  const Tensor x = dense_rows(given);
  Tensor out = empty(x.sizes(), x.scalar_type());
  backend.kernels->scale(type_of(x), address(x), x.size(0), x.size(1), x.stride(0), address(gain),
                         by_row, address_of_output(out), threads(16 * x.numel()));
  return out;
}

// The operands of (gain⊙dy) W, the gain in the smaller one.
std::pair<Tensor, Tensor> gained_operands(const CpuBackend& backend, const Tensor& dy,
                                          const Tensor& given, const Tensor& given_gain) {
  Tensor dy2 = flat(dy);
  if (dy2.size(1) % AMX_ROW && dy2.scalar_type() == at::kBFloat16) dy2 = dy2.contiguous();
  const Tensor weight = cast(given, dy.scalar_type());
  if (!given_gain.defined()) return {dy2, weight};
  const Tensor gain = dense_fp32(given_gain);
  if (dy2.size(0) < weight.size(1)) return {scale(backend, dy2, gain, false), weight};
  if (weight.stride(1) != 1 && weight.stride(0) == 1)
    return {dy2, scale(backend, weight.t(), gain, false).t()};
  return {dy2, scale(backend, weight, gain, true)};
}

// uᵀh, or its diagonal; u contains s.
Tensor core_grad(const CpuBackend& backend, const Tensor& u, const OutputGradSpec& spec) {
  if (spec.core.dim() == 1) return at::mul(cast(u, at::kFloat), spec.h).sum(0);
  return grad_project_rows(backend, dense_rows(spec.h), u, {spec.h});
}

// v = u·core
Tensor apply_core_transposed(const CpuBackend& backend, const Tensor& u, const Tensor& core) {
  if (core.dim() == 1) return at::mul(u, cast(core, u.scalar_type()));
  return project_rows(backend, u, core.t(), {}, {u}).first;
}

// out_scale⊙P with its frozen columns zero.
Tensor B_grad(const Tensor& P, const OutputGradSpec& spec) {
  Tensor dB = spec.out_scale.defined() ? at::mul(P, spec.out_scale.unsqueeze(1)) : P;
  if (spec.want_out_scale && spec.frozen_columns) dB.narrow(1, 0, spec.frozen_columns).zero_();
  return dB;
}

// ‖W + s·BA‖ of each row or column by torch's operations, in blocks of rows.
Tensor torch_norm(const Tensor& weight, const Tensor& A, const Tensor& B, double scaling,
                  bool by_row) {
  const Tensor wide_A = cast(A, at::kFloat);
  const int64_t rows = weight.size(0), step = max(1, BLOCK_ELEMENTS / max(1, weight.size(1)));
  Tensor norm = at::zeros({by_row ? rows : weight.size(1)}, at::kFloat);
  for (int64_t start = 0; start < rows; start += step) {
    const int64_t count = min(step, rows - start);
    const Tensor factor = cast(B.narrow(0, start, count), at::kFloat);
    const Tensor part = at::addmm(cast(weight.narrow(0, start, count), at::kFloat),
                                  at::mul(factor, scaling), wide_A);
    if (by_row) {
      Tensor out = norm.narrow(0, start, count);
      at::linalg_vector_norm_out(out, part, 2, at::IntArrayRef{1});
    } else {
      norm.add_(part.square().sum(0));
    }
  }
  return by_row ? norm : norm.sqrt_();
}

// a/b, 0 where b is 0.
Tensor divide_or_zero(const Tensor& a, const Tensor& b) {
  const bool small = a.scalar_type() == at::kFloat && b.scalar_type() == at::kFloat &&
                     a.dim() == 1 && b.dim() == 1 && a.is_contiguous() && b.is_contiguous();
  if (!small) return at::div(a, b).masked_fill(b.eq(0), 0);
  // One loop in place of three operations on [N].
  Tensor quotient = empty({a.size(0)}, at::kFloat);
  const float* above = a.const_data_ptr<float>();
  const float* below = b.const_data_ptr<float>();
  float* out = quotient.mutable_data_ptr<float>();
  for (int64_t i = 0; i < a.size(0); ++i) out[i] = below[i] == 0 ? 0 : above[i] / below[i];
  return quotient;
}

}  // namespace

std::pair<Tensor, Tensor> CpuBackend::project(const Tensor& x, const Tensor& A, const Tensor& core,
                                              Drop drop) const {
  auto [h, h_core] = project_rows(*this, dense_rows(x), A, core, drop);
  if (core.defined() && core.dim() == 1) h_core = apply_core(h, core);
  return {h, h_core};
}

Tensor CpuBackend::base_product(const Tensor& x, const Tensor& given) const {
  const Tensor weight = cast(given, x.scalar_type());
  if (plan & ONE_KERNEL && weight.stride(1) == 1) return one_kernel(x, weight, nullptr, {}, {}, {});
  return product(x, weight, {});
}

Tensor CpuBackend::one_kernel(const Tensor& x, const Tensor& weight, const Up* up,
                              const Tensor& given_gain, const Tensor& given_bias,
                              const Tensor& inner) const {
  const Tensor x2 = dense_rows(x), gain = dense_fp32(given_gain), bias = dense_fp32(given_bias);
  const int64_t M = x2.size(0), N = weight.size(0), K = weight.size(1);
  auto sizes = x.sizes().vec();
  sizes.back() = N;
  const Tensor y = empty(sizes, x.scalar_type());
  const Addition a = up ? prepared(up->h, up->B, 1) : Addition{};
  const Tensor scale = up ? dense_fp32(up->scale) : Tensor();
  const bool written = kernels->linear(
      type_of(x), address(x2), M, K, x2.stride(0), address(weight), N, weight.stride(0),
      address(a.h), up ? a.h.stride(0) : 0, up ? a.h.size(1) : 0, address(a.factor),
      up ? type_of(a.factor) : 0, up ? a.factor.stride(1) : 0, up ? a.factor.stride(0) : 0,
      static_cast<float>(up ? up->scaling : 1), address(scale), address(gain), address(bias),
      address_of_output(inner), threads(M * N * K), address_of_output(y));
  // An adapter that adds nothing changes no bit of the frozen layer's y.
  return written ? y : Tensor();
}

Tensor CpuBackend::product(const Tensor& given, const Tensor& given_weight,
                           const Tensor& bias) const {
  const auto dtype = given.scalar_type();
  const Tensor weight = cast(given_weight, dtype);
  const int64_t N = weight.size(0), K = weight.size(1), M = tokens(given);
  const Tensor x = K % AMX_ROW && dtype == at::kBFloat16 ? given.contiguous() : given;
  const bool large = M * N * K >= SMALL;
  const bool along = weight.stride(1) == 1 && weight.stride(0) != 1;
  if (plan & (along ? Y_ALONG : Y_ACROSS)) {
    auto sizes = x.sizes().vec();
    sizes.back() = N;
    const Tensor y = empty(sizes, dtype);
    add_by_panels(bias, flat(x), weight.t(), y.view({M, N}));
    return y;
  }
  if (large && bias.defined() && plan & ONEDNN_BIAS && onednn_serves(x, weight))
    return onednn_linear(x, weight, bias);
  if (!large && x.dim() == 2)
    return at::linear(x, weight, bias.defined() ? std::optional(bias) : std::nullopt);
  auto sizes = x.sizes().vec();
  sizes.back() = N;
  Tensor y = empty(sizes, x.scalar_type());
  Tensor y2 = x.dim() == 2 ? y : y.view({M, N});
  if (bias.defined())
    at::addmm_out(y2, bias, flat(x), weight.t());
  else
    at::mm_out(y2, flat(x), weight.t());
  return y;
}

std::pair<Tensor, Tensor> CpuBackend::linear(const Tensor& x, const Tensor& given, const Up& up,
                                             const Gain& gain, const Tensor& bias,
                                             bool keep_inner) const {
  const auto dtype = x.scalar_type();
  const Tensor weight = cast(given, dtype);
  // Without a gain the bias goes where the frozen layer adds it, so that an adapter at its start
  // changes no bit.
  const Tensor none;
  const Tensor gemm_bias = !gain.defined() && bias.defined() ? cast(bias, dtype) : none;
  const Tensor z = keep_inner ? empty({tokens(x), weight.size(0)}, dtype) : none;
  if (plan & ONE_KERNEL && weight.stride(1) == 1) {
    const Tensor y = one_kernel(x, weight, &up, gain.magnitude, bias, z);
    if (y.defined()) return {y, z};
  }
  Addition addition = prepared(up.h, up.B, 1);
  addition.scaling = up.scaling;
  addition.scale = dense_fp32(up.scale);
  addition.gain = dense_fp32(gain.magnitude);
  if (gain.defined()) addition.bias = dense_fp32(bias);
  Tensor y = product(x, weight, gemm_bias);
  low_rank_add(*this, addition, {none}, z, y);
  return {y, z};
}

OutputGrads CpuBackend::grad_output(const Tensor& dy, const OutputGradSpec& spec,
                                    const Gain& given_gain, const Tensor& given_kept,
                                    bool want_bias) const {
  const Tensor dy2 = dense_rows(dy), gain = dense_fp32(given_gain.magnitude);
  const Tensor kept = given_kept.defined() ? dense_rows(given_kept) : given_kept;
  const int64_t M = dy2.size(0), N = dy2.size(1), R = spec.B.size(1);
  OutputGrads grads;
  if (want_bias) grads.d_bias = empty({N}, at::kFloat);
  if (kept.defined()) grads.dot = empty({N}, at::kFloat);
  Tensor u, P, h_core;
  if (spec.want_v || spec.want_core) u = empty({M, R}, low_rank_grad_dtype(dy2.scalar_type()));
  int64_t columns = 0;
  if (spec.want_B || spec.want_out_scale) {
    const int64_t skipped = spec.want_out_scale ? 0 : spec.frozen_columns;
    columns = R - skipped;
    P = skipped ? at::zeros({N, R}, at::kFloat) : empty({N, R}, at::kFloat);
    h_core = spec.h;
    if (spec.core.defined()) {
      const Tensor h = dense_rows(spec.h);
      h_core = spec.core.dim() == 1 ? apply_core(h, spec.core)
                                    : project_rows(*this, h, spec.core, {}, {h}).first;
    }
    h_core = dense_rows(h_core);
  }
  const Tensor B = in_kernel_type(spec.B), scale = dense_fp32(spec.out_scale);
  kernels->grad_output(
      type_of(dy2), address(dy2), M, N, dy2.stride(0), R, address(B), type_of(B), B.stride(1),
      B.stride(0), static_cast<float>(spec.scaling), address(gain), address(scale),
      address_of_output(u), address(h_core), columns ? h_core.stride(0) : 0, columns,
      address_of_output(P), address_of_output(grads.d_bias), address(kept),
      kept.defined() ? kept.stride(0) : 0, address_of_output(grads.dot), threads(M * N * R));
  if (spec.want_v) grads.v = spec.core.defined() ? apply_core_transposed(*this, u, spec.core) : u;
  if (spec.want_B) grads.dB = B_grad(P, spec);
  if (spec.want_core) grads.d_core = core_grad(*this, u, spec);
  if (spec.want_out_scale) grads.d_out_scale = at::mul(P, spec.B).sum(1);
  return grads;
}

Tensor CpuBackend::grad_input(const Tensor& dy, const Tensor& weight, const Tensor& gain,
                              const Tensor& v, const Tensor& A, Drop drop) const {
  auto sizes = dy.sizes().vec();
  sizes.back() = weight.size(1);
  Tensor dx = empty(sizes, dy.scalar_type());
  Tensor dx2 = dx.dim() == 2 ? dx : flat(dx);
  const auto [a, b] = gained_operands(*this, dy, weight, gain);
  const Addition addition = v.defined() ? prepared(v, A, 0) : Addition{};
  const bool along = b.stride(0) == 1 && b.stride(1) != 1;
  if (plan & (along ? DX_ALONG : DX_ACROSS))
    add_by_panels({}, a, b, dx2);
  else
    at::mm_out(dx2, a, b);
  if (v.defined()) low_rank_add(*this, addition, drop, {}, dx);
  return dx;
}

Tensor CpuBackend::grad_project(const Tensor& x, const Tensor& v, Drop drop) const {
  return grad_project_rows(*this, dense_rows(x), v, drop);
}

Tensor CpuBackend::drop(const Tensor& given, Drop drop) const {
  const Tensor x = dense_rows(given);
  Tensor out = empty(given.sizes(), given.scalar_type());
  kernels->drop(type_of(x), address(x), x.size(0), x.size(1), x.stride(0), seed_address(drop),
                drop.threshold, 0, address_of_output(out), threads(16 * x.numel()));
  return out;
}

Tensor CpuBackend::row_norm(const Tensor& given, const Tensor& A, const Tensor& given_B,
                            double scaling, bool rows_asked) const {
  const Tensor B = in_kernel_type(given_B);
  Tensor weight = given, down = A, up = B.t();
  bool by_row = rows_asked;
  if (weight.stride(1) != 1 && weight.stride(0) == 1) {
    // ‖Wᵀ + sAᵀBᵀ‖ along the other axis: a transposed weight is read without a copy.
    weight = weight.t();
    std::swap(down, up);
    by_row = !by_row;
  }
  weight = dense_rows(weight);
  const int64_t N = weight.size(0), K = weight.size(1), R = A.size(0);
  Tensor norm = empty({by_row ? N : K}, at::kFloat);
  const bool adapted = kernels->row_norm(
      type_of(weight), address(weight), N, K, weight.stride(0), R, address(down), type_of(down),
      down.stride(0), down.stride(1), address(up), type_of(up), up.stride(0), up.stride(1),
      static_cast<float>(scaling), by_row, address_of_output(norm), threads(N * K * R));
  if (adapted) return norm;
  // BA is zero: torch's own norm, as lorafast/engine/backends/eager.py has it.
  return torch_norm(given, A, B, scaling, rows_asked);
}

Tensor CpuBackend::gain_of(const Tensor& magnitude, const Tensor& norm) const {
  return divide_or_zero(cast(magnitude, norm.scalar_type()), norm);
}

std::pair<Tensor, Tensor> CpuBackend::gain_grads(const Tensor& d_gain, const Tensor& gain,
                                                 const Tensor& norm, bool by_gain,
                                                 bool want_norm) const {
  const Tensor d_magnitude = divide_or_zero(by_gain ? divide_or_zero(d_gain, gain) : d_gain, norm);
  return {d_magnitude, want_norm ? at::mul(at::neg(d_magnitude), gain) : Tensor()};
}

}  // namespace lorafast::host
