#include "cuda_grad_output.h"

#include <ATen/ops/mul.h>
#include <ATen/ops/stack.h>

#include <array>

#include "cuda_kernels.h"
#include "precision.h"

namespace lorafast::host::cuda {
namespace {

using at::Tensor;

// The most ranks whose u, and whose P, one pass over dy makes; more take project and grad_project.
constexpr int64_t U_RANKS = 16, P_RANKS = 32;

// s·gain⊙B, B [N,R] and gain in fp32, as the pass over dy reads it. B undefined: none.
struct Factor {
  Tensor B;
  double scaling = 1;
  Tensor gain = {};
};

// What a pass over dy gives, in parts; undefined for what was not requested.
struct Parts {
  Tensor u, P, sums;
};

// Make one pass over dy, for u = dy·factor, P = hᵀ dy and the sums that are requested.
Parts stream(const Device& device, const Tensor& dy2, const Tensor& kept2, const Factor& factor,
             const Tensor& given_h, int requested) {
  const int64_t M = dy2.size(0), N = dy2.size(1);
  const auto type = dy2.scalar_type();
  const bool has_h = given_h.defined(), has_u = factor.B.defined();
  const int64_t u_ranks = has_u ? factor.B.size(1) : 0;
  const int tiles = has_h ? tiles_of(std::max(given_h.size(1), u_ranks)) : 2;
  const bool aligned = is_aligned(dy2) && (requested < 2 || is_aligned(kept2));
  const auto [count, steps] = split(device, ceil_div(N, 256), ceil_div(M, 16));
  Parts parts;
  Tensor h, P, none;
  if (has_u) parts.u = empty(dy2, {ceil_div(N, 256), M, u_ranks}, at::kFloat);
  if (has_h) {
    h = token_factor(device, given_h, type, tiles);
    P = empty(dy2, {count, h.size(1), N}, at::kFloat);
    parts.P = P.narrow(1, 0, given_h.size(1));
  }
  if (requested) parts.sums = empty(dy2, {count, requested, N}, at::kFloat);
  const Tensor& kept = requested == 2 ? kept2 : none;
  constexpr int SUMS[] = {0, 8, 8 + 16};
  const int flags = has_u + aligned * ALIGNED + 4 * has_h + SUMS[requested];
  device.launch(form_of(Stem::grad_output, type, tiles, flags), {ceil_div(N, 256), count, 1}, dy2,
                kept, h, small(factor.gain), factor.B, none, parts.u, P, parts.sums, M,
                dy2.stride(0), dy2.stride(1), kept.defined() ? kept.stride(0) : 0,
                kept.defined() ? kept.stride(1) : 0, has_h ? h.stride(0) : 0,
                has_u ? factor.B.stride(0) : 0, has_u ? factor.B.stride(1) : 0, steps, i32(N),
                i32(u_ranks), has_h ? i32(h.size(1)) : 0, 0, static_cast<float>(factor.scaling));
  return parts;
}

// s·gain⊙out_scale⊙B, and what u has to be multiplied by, or undefined. A copy, unless the pass
// over dy multiplies and rounds it.
std::pair<Factor, Tensor> u_factor(const Device& device, const OutputGradSpec& spec,
                                   const Tensor& gain, at::ScalarType dtype, bool one_pass) {
  const auto wide = low_rank_grad_dtype(dtype);
  const bool fits = spec.B.scalar_type() == at::kFloat && !spec.out_scale.defined() &&
                    (!gain.defined() || gain.scalar_type() == at::kFloat);
  if (one_pass && wide == dtype && fits) return {{spec.B, spec.scaling, gain}, {}};
  Tensor column_scale = gain.defined() ? gain : spec.out_scale, inverse;
  if (gain.defined() && spec.out_scale.defined())
    column_scale = at::stack({cast(gain, at::kFloat), cast(spec.out_scale, at::kFloat)}).prod(0);
  // The pass over dy reads fp32, and rounds it.
  Tensor F = scale(device, spec.B.t(), one_pass ? at::kFloat : wide,
                   {-1, -1, spec.scaling, {}, column_scale});
  if (wide != dtype) std::tie(F, inverse) = scaled_to_fp16(F);
  return {{one_pass ? cast(F.t(), at::kFloat) : F.t()}, inverse};
}

// u and v = u·core, from parts or by a pass of their own.
std::pair<Tensor, Tensor> u_and_v(const Device& device, const Tensor& dy2, const Tensor& parts,
                                  const Factor& factor, const OutputGradSpec& spec) {
  const Tensor none, core = spec.core.defined() ? spec.core.t() : none;
  const auto dtype = low_rank_grad_dtype(dy2.scalar_type());
  if (parts.defined()) return finish(device, parts, core, 1, dtype);
  return project(device, dy2, factor.B.t(), core, {none}, dtype);
}

// dB and d_out_scale.  given [splits,·,N], or undefined if every column is frozen
std::pair<Tensor, Tensor> finish_P(const Device& device, const Tensor& given,
                                   const OutputGradSpec& spec, const Tensor& given_gain,
                                   int64_t skipped) {
  const int64_t N = spec.B.size(0), R = spec.B.size(1);
  Tensor dB, d_out_scale, tensor;
  if (spec.want_B) dB = empty(spec.B, {N, R}, at::kFloat);
  if (spec.want_out_scale) d_out_scale = empty(spec.B, {N}, at::kFloat);
  const Tensor parts = given.defined() ? given : empty(spec.B, {0, 0, N}, at::kFloat);
  const Tensor gain = small(given_gain), out_scale = small(spec.out_scale), B = small(spec.B);
  // The parts may be some rows of wider ones.
  const int64_t width = parts.size(0) && N ? parts.stride(0) / N : 0;
  device.launch({Stem::grad_output_finish, at::kFloat}, {ceil_div(N, 32), 1, 1}, parts, gain,
                out_scale, B, tensor, dB, d_out_scale, spec.B.stride(0), spec.B.stride(1), i32(N),
                i32(R), i32(width), i32(skipped), i32(spec.frozen_columns), i32(parts.size(0)),
                number_of(gain), number_of(out_scale), number_of(B), 0,
                static_cast<float>(spec.scaling));
  return {dB, d_out_scale};
}

}  // namespace

OutputGrads grads_of(const Device& device, const Tensor& dy2, const OutputGradSpec& spec,
                     const Tensor& gain, const Tensor& kept2, bool want_bias) {
  const auto dtype = dy2.scalar_type();
  const int64_t R = spec.B.size(1);
  int requested = kept2.defined() ? 2 : want_bias;
  const bool needs_u = spec.want_v || spec.want_core, needs_P = spec.want_B || spec.want_out_scale;
  const int64_t skipped = spec.want_out_scale ? 0 : spec.frozen_columns;
  const Tensor none;
  Tensor h, sums;
  if (needs_P) {
    h = apply_core(spec.h, spec.core);
    h = h.narrow(1, skipped, h.size(1) - skipped);
  }
  const int64_t live = needs_P ? h.size(1) : 0;
  const bool streams_P = 0 < live && live <= P_RANKS;
  const bool one_pass = needs_u && std::max(R, live) <= U_RANKS && live > 0 && is_aligned(dy2);
  if (requested == 2 && (dtype == at::kFloat || !(is_aligned(dy2) && is_aligned(kept2)))) {
    // Beside u and P there are no registers for Σ dy⊙kept.
    sums = sum_parts(device, stream(device, dy2, kept2, {}, none, requested).sums);
    requested = 0;
  }
  Factor factor;
  Tensor inverse;
  if (needs_u) std::tie(factor, inverse) = u_factor(device, spec, gain, dtype, one_pass);
  Parts parts;
  if (one_pass || streams_P || requested)
    parts =
        stream(device, dy2, kept2, one_pass ? factor : Factor{}, streams_P ? h : none, requested);
  OutputGrads grads;
  Tensor u;
  if (needs_u) {
    Tensor v;
    std::tie(u, v) = u_and_v(device, dy2, parts.u, factor, spec);
    if (inverse.defined()) {
      u = at::mul(u, inverse);
      v = at::mul(v, inverse);
    }
    if (spec.want_v) grads.v = v;
  }
  if (needs_P) {
    const Tensor P = live > P_RANKS ? grad_project(device, dy2, h, {none}).unsqueeze(0) : parts.P;
    std::tie(grads.dB, grads.d_out_scale) = finish_P(device, P, spec, gain, skipped);
  }
  if (spec.want_core)
    grads.d_core = spec.core.dim() == 1 ? at::mul(cast(u, at::kFloat), spec.h).sum(0)
                                        : grad_project(device, spec.h, u, {none});
  if (requested) sums = sum_parts(device, parts.sums);
  if (want_bias) grads.d_bias = sums[0];
  if (kept2.defined()) grads.dot = sums[1];
  return grads;
}

}  // namespace lorafast::host::cuda
