#include "formula.h"

#include <ATen/ops/add.h>
#include <ATen/ops/addcmul.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/sub.h>

#include <cmath>
#include <tuple>

namespace lorafast::host {
namespace {

using at::Tensor;

// lorafast/engine/philox.py: probabilities are multiples of 1/65536.
uint32_t threshold(double p) { return static_cast<uint32_t>(std::nearbyint(p * 65536)); }

Drop drop_of(const Tensors& tensors, const Options& options) {
  return {tensors.seed, options.dropout > 0 ? threshold(options.dropout) : 0};
}

// m/norm in the norm's dtype; undefined without a magnitude.
Tensor gain_of(const Backend& backend, const Tensors& tensors) {
  if (!tensors.magnitude.defined()) return {};
  return backend.gain_of(tensors.magnitude, tensors.norm);
}

// The gain as linear and grad_output take it; a tensor beside a bias that it multiplies.
Gain gain_for(const Backend& backend, const Tensors& tensors) {
  if (backend.divides() && !tensors.lora_bias.defined() && tensors.magnitude.defined())
    return {tensors.magnitude, tensors.norm};
  return {gain_of(backend, tensors), {}};
}

// The inputs of the adapter and of the base product: _inputs of the twin.
std::pair<Tensor, Tensor> inputs(const Backend& backend, const Tensor& x, const Tensors& tensors,
                                 const Options& options) {
  Tensor base_x = x;
  if (options.drops_base()) base_x = backend.drop(x, drop_of(tensors, options));
  if (!options.in_axis) return {x, base_x};
  const Tensor gain = gain_of(backend, tensors);
  Tensor adapter_x = at::empty(x.sizes(), x.options());
  at::mul_out(adapter_x, x, gain);
  if (!options.drops_base()) return {adapter_x, adapter_x};
  at::addcmul_out(base_x, x, base_x, at::sub(gain, 1));
  return {adapter_x, base_x};
}

// bias + s·gain⊙lora_bias in the accumulator's dtype.  [N]
Tensor total_bias(const Tensors& tensors, const Options& options, const Tensor& gain) {
  Tensor bias =
      at::mul(cast(tensors.lora_bias, accumulator(tensors.weight.scalar_type())), options.scaling);
  if (gain.defined()) bias = at::mul(bias, gain);
  return tensors.bias.defined() ? at::add(bias, tensors.bias) : bias;
}

// z again, by one product.
Tensor inner(const Backend& backend, const Tensor& x, const Tensor& h, const Tensors& tensors,
             const Options& options) {
  const Tensor h_core = apply_core(h, tensors.core);
  const Up up{h_core, tensors.B, options.scaling, tensors.out_scale};
  const Tensor base_x = inputs(backend, x, tensors, options).second;
  return backend.linear(base_x, tensors.weight, up, {}, {}, false).first;
}

// Σ dy⊙z from z; from y = gain⊙z + bias it is gain⊙Σ dy⊙z.  [N]
Tensor d_gain_of(const OutputGrads& sums, const Tensors& tensors, const Options& options) {
  if (options.keep == Keep::output)
    return tensors.bias.defined() ? at::sub(sums.dot, at::mul(tensors.bias, sums.d_bias))
                                  : sums.dot;
  if (!tensors.lora_bias.defined()) return sums.dot;
  return at::add(sums.dot, at::mul(at::mul(tensors.lora_bias, options.scaling), sums.d_bias));
}

// (out_scale⊙B)·core in the accumulator's dtype.
Tensor effective_B(const Tensors& tensors) {
  const auto wide = accumulator(tensors.weight.scalar_type());
  Tensor B = cast(tensors.B, wide);
  if (tensors.core.defined()) {
    const Tensor core = cast(tensors.core, wide);
    B = core.dim() == 1 ? at::mul(B, core) : at::mm(B, core);
  }
  return tensors.out_scale.defined() ? at::mul(B, cast(tensors.out_scale, wide).unsqueeze(1)) : B;
}

// dx where the gain scales rows: _d_x_by_row of the twin.
Tensor d_x_by_row(const Backend& backend, const Tensor& dy, const Tensor& v, const Tensor& gain,
                  const Tensors& tensors, const Options& options) {
  const Drop mask = drop_of(tensors, options);
  if (!options.drops_base())
    return backend.grad_input(dy, tensors.weight, gain, v, tensors.A, mask);
  // dx = dy W + mask⊙(((gain-1)⊙dy) W + v A): the correction and the adapter share one mask.
  const Tensor through_drop =
      backend.grad_input(dy, tensors.weight, at::sub(gain, 1), v, tensors.A, {mask.seed});
  const Tensor dropped = backend.drop(through_drop, mask);
  return backend.grad_input(dy, tensors.weight, {}, {}, {}, {mask.seed}).add_(dropped);
}

// The gradients of gain = m/norm. by_gain: d_gain has to be divided by the gain first.
void add_gain_grads(const Backend& backend, const Tensor& d_gain, const Tensor& gain, bool by_gain,
                    const Tensors& tensors, const Needs& needs, Grads& grads) {
  std::tie(grads[MAGNITUDE], grads[NORM]) =
      backend.gain_grads(d_gain, gain, tensors.norm, by_gain, needs[NORM]);
}

// dx and the gradients of magnitude and norm through in_gain⊙x: _in_axis_grads of the twin.
void add_in_axis_grads(const Backend& backend, const Tensor& dy, const Tensor& x, const Tensor& v,
                       const Tensor& gain, const Tensors& tensors, const Options& options,
                       const Needs& needs, Grads& grads) {
  const Drop mask = drop_of(tensors, options);
  Tensor d_scaled;
  if (!options.drops_base()) {
    d_scaled = backend.grad_input(dy, tensors.weight, {}, v, tensors.A, mask);
    grads[X] = at::mul(d_scaled, gain);
  } else {
    const Tensor d_base = backend.grad_input(dy, tensors.weight, {}, {}, {}, {mask.seed});
    const Tensor dropped = backend.drop(d_base, mask);
    const Tensor part = at::mm(v, cast(tensors.A, v.scalar_type())).view_as(d_base);
    const Tensor dropped_part = backend.drop(part, mask);
    grads[X] =
        at::add(at::add(d_base, at::mul(at::sub(gain, 1), dropped)), at::mul(gain, dropped_part));
    d_scaled = at::add(dropped, dropped_part);
  }
  if (!needs_gain(needs)) return;
  const Tensor products = at::mul(cast(d_scaled, gain.scalar_type()), x);
  add_gain_grads(backend, products.reshape({tokens(x), x.size(-1)}).sum(0), gain, false, tensors,
                 needs, grads);
}

}  // namespace

Outputs forward(const Backend& backend, const Tensor& x, const Tensors& tensors,
                const Options& options) {
  const bool has_gain = tensors.magnitude.defined();
  const bool drops_base = has_gain && options.drops_base();
  Tensor base_x = x, adapter_x = x;
  Gain gain;
  if (drops_base || (has_gain && options.in_axis))
    std::tie(adapter_x, base_x) = inputs(backend, x, tensors, options);
  if (!options.in_axis) gain = gain_for(backend, tensors);
  const Tensor bias =
      tensors.lora_bias.defined() ? total_bias(tensors, options, gain.magnitude) : tensors.bias;
  const auto [h, h_core] =
      backend.project(adapter_x, tensors.A, tensors.core, drop_of(tensors, options));
  const Up up{h_core, tensors.B, options.scaling, tensors.out_scale};
  auto [y, z] = backend.linear(base_x, tensors.weight, up, gain, bias, options.keep == Keep::inner);
  // x Wᵀ + (gain-1)⊙drop(x) Wᵀ, in a form in which nothing large cancels whatever the gain.
  if (drops_base && gain.defined())
    y.add_(backend.base_product(at::sub(x, base_x), tensors.weight));
  return {y, h, z};
}

Grads backward(const Backend& backend, const Tensor& dy, const Tensor& x, const Tensor& h,
               const Tensor& given_kept, const Tensors& tensors, const Options& options,
               const Needs& needs) {
  const bool has_gain = tensors.magnitude.defined();
  const bool by_row = has_gain && !options.in_axis;
  const bool needs_dot = by_row && needs_gain(needs);
  const bool needs_columns = has_gain && !by_row && needs_gain(needs);
  Gain row_gain;
  if (by_row) row_gain = gain_for(backend, tensors);
  Tensor kept;
  if (needs_dot)
    kept = options.keep == Keep::recompute ? inner(backend, x, h, tensors, options) : given_kept;
  // Σ dy⊙kept is corrected by a bias: y contains the base's, z lacks the adapter's.
  const Tensor& correction = options.keep == Keep::output ? tensors.bias : tensors.lora_bias;
  const OutputGradSpec spec{tensors.B,
                            options.scaling,
                            tensors.out_scale,
                            tensors.core,
                            h,
                            options.frozen_columns,
                            needs[X] || needs[LORA_A] || needs_columns,
                            needs[LORA_B],
                            needs[CORE],
                            needs[OUT_SCALE]};
  const bool want_bias = needs[BIAS] || needs[LORA_BIAS] || (needs_dot && correction.defined());
  row_gain.of_sums = row_gain.norm.defined() && needs_dot && !correction.defined();
  row_gain.by_gain = options.keep == Keep::output;
  row_gain.want_norm = needs[NORM];
  const OutputGrads sums = backend.grad_output(dy, spec, row_gain, kept, want_bias);
  Tensor gain = sums.gain;
  if (has_gain && !gain.defined())
    gain = row_gain.defined() && !row_gain.norm.defined() ? row_gain.magnitude
                                                          : gain_of(backend, tensors);
  Grads grads;
  grads[LORA_B] = sums.dB;
  grads[CORE] = sums.d_core;
  grads[OUT_SCALE] = sums.d_out_scale;
  grads[BIAS] = sums.d_bias;
  if (needs[LORA_BIAS]) {
    grads[LORA_BIAS] = at::mul(sums.d_bias, options.scaling);
    if (by_row) grads[LORA_BIAS] = at::mul(grads[LORA_BIAS], gain);
  }
  const Drop mask = drop_of(tensors, options);
  if (needs[LORA_A]) {
    const bool gains_x = has_gain && options.in_axis;
    grads[LORA_A] = backend.grad_project(gains_x ? inputs(backend, x, tensors, options).first : x,
                                         sums.v, mask);
  }
  if (!has_gain) {
    if (needs[X]) grads[X] = backend.grad_input(dy, tensors.weight, {}, sums.v, tensors.A, mask);
  } else if (by_row) {
    if (needs_dot && sums.d_magnitude.defined()) {
      grads[MAGNITUDE] = sums.d_magnitude;
      grads[NORM] = sums.d_norm;
    } else if (needs_dot)
      add_gain_grads(backend, d_gain_of(sums, tensors, options), gain, options.keep == Keep::output,
                     tensors, needs, grads);
    if (needs[X]) grads[X] = d_x_by_row(backend, dy, sums.v, gain, tensors, options);
  } else if (needs[X] || needs_columns) {
    add_in_axis_grads(backend, dy, x, sums.v, gain, tensors, options, needs, grads);
  }
  const std::array<const Tensor*, GRADS> likes{
      &dy,           &tensors.bias,      &tensors.A,
      &tensors.B,    &tensors.core,      &tensors.magnitude,
      &tensors.norm, &tensors.out_scale, &tensors.lora_bias};
  for (int i = 0; i < GRADS; ++i) {
    if (!needs[i])
      grads[i] = Tensor();
    else if (likes[i]->defined())
      grads[i] = cast(grads[i], likes[i]->scalar_type());
  }
  return grads;
}

Tensor norm_of(const Backend& backend, const Tensors& tensors, const Options& options) {
  const bool plain = !tensors.core.defined() && !tensors.out_scale.defined();
  return backend.row_norm(tensors.weight, tensors.A, plain ? tensors.B : effective_B(tensors),
                          options.scaling, !options.in_axis);
}

Saved saved_for(const Needs& needs, const Options& options, bool has_gain) {
  const bool h = needs[LORA_B] || needs[CORE] || needs[OUT_SCALE];
  const bool by_row = has_gain && needs_gain(needs) && !options.in_axis;
  const bool by_column = has_gain && needs_gain(needs) && options.in_axis;
  const bool recomputed = by_row && options.keep == Keep::recompute;
  return {needs[LORA_A] || recomputed || by_column, h || recomputed,
          by_row && options.keep == Keep::output, by_row && options.keep == Keep::inner};
}

}  // namespace lorafast::host
