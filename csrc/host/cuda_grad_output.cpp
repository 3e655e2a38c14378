#include "cuda_grad_output.h"

#include <ATen/ops/empty_like.h>
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

// s·gain⊙B, B [N,R] in fp32, as the pass over dy reads it. B undefined: none.
struct Factor {
  Tensor B;
  double scaling = 1;
  Gain gain = {};
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
  // With u half as many blocks have twice as many warps.
  const int64_t blocks = ceil_div(N, has_u ? 512 : 256);
  const auto [count, steps] = split(device, has_u ? 2 * blocks : blocks, ceil_div(M, 16));
  Parts parts;
  Tensor h, P, none;
  if (has_u) parts.u = empty(dy2, {blocks, M, u_ranks}, at::kFloat);
  if (has_h) {
    h = token_factor(device, given_h, type, tiles);
    P = empty(dy2, {count, h.size(1), N}, at::kFloat);
    parts.P = P.narrow(1, 0, given_h.size(1));
  }
  if (requested) parts.sums = empty(dy2, {count, requested, N}, at::kFloat);
  const Tensor& kept = requested == 2 ? kept2 : none;
  const auto [m, norm] = gain_operands(factor.gain);
  constexpr int SUMS[] = {0, 8, 8 + 16};
  const int flags = has_u + aligned * ALIGNED + 4 * has_h + SUMS[requested];
  device.launch(form_of(Stem::grad_output, type, tiles, flags), {blocks, count, 1}, dy2, kept, h, m,
                norm, factor.B, none, parts.u, P, parts.sums, M, dy2.stride(0), dy2.stride(1),
                kept.defined() ? kept.stride(0) : 0, kept.defined() ? kept.stride(1) : 0,
                has_h ? h.stride(0) : 0, has_u ? factor.B.stride(0) : 0,
                has_u ? factor.B.stride(1) : 0, steps, i32(N), i32(u_ranks),
                has_h ? i32(h.size(1)) : 0, 0, number_of(m), static_cast<float>(factor.scaling));
  return parts;
}

// A copy of s·gain⊙out_scale⊙B, and what u has to be multiplied by, or undefined.
std::pair<Factor, Tensor> u_factor(const Device& device, const OutputGradSpec& spec,
                                   const Tensor& gain, at::ScalarType dtype, bool one_pass) {
  const auto wide = low_rank_grad_dtype(dtype);
  Tensor column_scale = gain.defined() ? gain : spec.out_scale, inverse;
  if (gain.defined() && spec.out_scale.defined())
    column_scale = at::stack({cast(gain, at::kFloat), cast(spec.out_scale, at::kFloat)}).prod(0);
  // The pass over dy reads fp32, and rounds it.
  Tensor F = scale(device, spec.B.t(), one_pass ? at::kFloat : wide,
                   {-1, -1, spec.scaling, {}, column_scale});
  if (wide != dtype) std::tie(F, inverse) = scaled_to_fp16(F);
  return {{one_pass ? cast(F.t(), at::kFloat) : F.t()}, inverse};
}

// What parts come to; undefined for what was not requested.
struct Finished {
  Tensor u, v, dB, d_out_scale, sums, gain, d_magnitude, d_norm;
};

// What parts come to; P is undefined if every column is frozen.
Finished finish(const Device& device, const Parts& parts, const Tensor& dy2,
                const OutputGradSpec& spec, const Gain& gain, int64_t skipped) {
  const int64_t M = dy2.size(0), N = dy2.size(1), R = spec.B.size(1);
  const auto dtype = low_rank_grad_dtype(dy2.scalar_type());
  const bool has_u = parts.u.defined(), has_sums = parts.sums.defined();
  Finished done;
  Tensor core, v, tensor;
  if (has_u) {
    if (spec.core.defined()) core = small(spec.core.t());
    done.u = empty(dy2, {M, R}, dtype);
    if (core.defined()) v = at::empty_like(done.u);
  }
  if (has_sums) done.sums = empty(parts.sums, parts.sums.sizes().slice(1), at::kFloat);
  if (spec.want_B) done.dB = empty(dy2, {N, R}, at::kFloat);
  if (spec.want_out_scale) done.d_out_scale = empty(dy2, {N}, at::kFloat);
  const Tensor P = parts.P.defined() ? parts.P : empty(dy2, {0, 0, N}, at::kFloat);
  const Tensor out_scale = small(spec.out_scale), B = small(spec.B);
  const auto [m, norm] = gain_operands(gain);
  if (norm.defined()) {
    done.gain = empty(norm, norm.sizes(), at::kFloat);
    if (gain.of_sums && has_sums && done.sums.size(0) == 2) {
      done.d_magnitude = at::empty_like(done.gain);
      if (gain.want_norm) done.d_norm = at::empty_like(done.gain);
    }
  }
  // The parts may be some rows of wider ones.
  const int64_t width = P.size(0) && N ? P.stride(0) / N : 0;
  const int64_t sums_n = has_sums ? done.sums.numel() : 0;
  const int64_t blocks = ceil_div(N, 32) + ceil_div(sums_n, 256) + (has_u ? ceil_div(M, 128) : 0);
  const auto [core_rows, core_columns] = core_strides(core);
  device.launch(form_of(Stem::grad_output_finish, dtype, has_u ? tiles_of(R) : 2), {blocks, 1, 1},
                P, m, norm, out_scale, B, tensor, done.dB, done.d_out_scale, done.gain,
                done.d_magnitude, done.d_norm, parts.u, done.u, v, core, parts.sums, done.sums,
                spec.B.stride(0), spec.B.stride(1), M, core_rows, core_columns, sums_n, i32(N),
                i32(R), i32(width), i32(skipped), i32(spec.frozen_columns), i32(P.size(0)),
                has_u ? i32(parts.u.size(0)) : 0, has_sums ? i32(parts.sums.size(0)) : 0,
                i32(gain.of_sums && gain.by_gain), number_of(m), number_of(out_scale), number_of(B),
                0, core_dims(core), number_of(core), static_cast<float>(spec.scaling));
  done.v = v.defined() ? v : done.u;
  return done;
}

}  // namespace

OutputGrads grads_of(const Device& device, const Tensor& dy2, const OutputGradSpec& spec,
                     const Gain& gain, const Tensor& kept2, bool want_bias) {
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
  // The pass over dy multiplies and rounds the factor of u.
  const bool fits = low_rank_grad_dtype(dtype) == dtype && spec.B.scalar_type() == at::kFloat &&
                    !spec.out_scale.defined();
  if (needs_u && one_pass && fits)
    factor = {spec.B, spec.scaling, gain};
  else if (needs_u)
    std::tie(factor, inverse) = u_factor(device, spec, gain_tensor(device, gain), dtype, one_pass);
  Parts parts;
  if (one_pass || streams_P || requested)
    parts =
        stream(device, dy2, kept2, one_pass ? factor : Factor{}, streams_P ? h : none, requested);
  Finished done;
  if (needs_P) {
    if (live > P_RANKS) parts.P = grad_project(device, dy2, h, {none}).unsqueeze(0);
    done = finish(device, parts, dy2, spec, gain, skipped);
  }
  if (needs_u && !one_pass) {
    const Tensor core = spec.core.defined() ? spec.core.t() : none;
    std::tie(done.u, done.v) =
        project(device, dy2, factor.B.t(), core, {none}, low_rank_grad_dtype(dtype));
  }
  if (inverse.defined()) {
    done.u = at::mul(done.u, inverse);
    done.v = at::mul(done.v, inverse);
  }
  OutputGrads grads{spec.want_v ? done.v : none, done.dB, {}, done.d_out_scale, {}, {}};
  if (spec.want_core)
    grads.d_core = spec.core.dim() == 1 ? at::mul(cast(done.u, at::kFloat), spec.h).sum(0)
                                        : grad_project(device, spec.h, done.u, {none});
  if (requested) sums = needs_P ? done.sums : sum_parts(device, parts.sums);
  if (want_bias) grads.d_bias = sums[0];
  if (kept2.defined()) grads.dot = sums[1];
  grads.gain = done.gain;
  grads.d_magnitude = done.d_magnitude;
  grads.d_norm = done.d_norm;
  return grads;
}

}  // namespace lorafast::host::cuda
