"""The formula of one adapted layer, its norm and its gradients, as calls of primitives.

z = (in_gain⊙x) Wᵀ + s·out_scale⊙(core(drop(in_gain⊙x) Aᵀ) Bᵀ)        y = gain⊙z + bias
"""

from __future__ import annotations

from typing import Any

import torch

from lorafast.engine import dispatch, masks
from lorafast.engine.backends import Backend
from lorafast.engine.dispatch import Routes
from lorafast.engine.precision import accumulator, apply_core, divide_or_zero
from lorafast.engine.problem import (
    BaseTerm,
    CallOptions,
    DownProj,
    Gain,
    GradMask,
    LayerTensors,
    LowRankTerm,
    OutputGrads,
    SavedMask,
    UpProj,
    UpProjGradSpec,
    scaling_of,
    tokens,
)


def forward(
    x: torch.Tensor, tensors: LayerTensors, options: CallOptions, routes: Routes | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return y [...,N], h [M,R] and, with keep="inner", z [M,N] (else None): all fresh.

    routes: the backends, where they are not those of a single layer.
    """
    if routes is None:
        routes = dispatch.routes(x, tensors, options)
    base_x, adapter_x, gain, bias = x, x, None, tensors.bias
    drops_base = False
    if tensors.magnitude is not None:
        drops_base = options.dropout > 0 and options.dropout_on == "both"
        if drops_base or options.axis == "in":
            adapter_x, base_x = _inputs(x, tensors, options, routes)
        if options.axis == "out":
            # Written out: a call more would be a part of a small layer's time.
            own_gain_of = getattr(routes["linear"], "gain_of", gain_of)
            divides = hasattr(routes["linear"], "LINEAR_DIVIDES")
            gain = (
                _gain_for("linear", tensors, routes)
                if divides
                else own_gain_of(tensors.magnitude, tensors.norm)
            )
    if tensors.lora_bias is not None:
        bias = _total_bias(tensors, options, gain)
    scaling = options.scaling if tensors.scale is None else tensors.scale
    down = DownProj(tensors.lora_A, tensors.core, tensors.seed, options.dropout)
    ((h, h_core),) = routes["project"].project(adapter_x, [down])
    ups = [UpProj(h_core, tensors.lora_B, scaling, tensors.out_scale)]
    linear = routes["linear"].linear
    y, z = linear(base_x, tensors.weight, ups, gain, bias, options.keep == "inner")
    if drops_base and gain is not None:
        # x Wᵀ + (gain-1)⊙drop(x) Wᵀ, in a form in which nothing large cancels whatever the gain.
        y += linear(x - base_x, tensors.weight, [])[0]
    return y, h, z


def backward(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    h: torch.Tensor | None,
    kept: torch.Tensor | None,
    tensors: LayerTensors,
    options: CallOptions,
    needs: GradMask,
    routes: Routes | None = None,
) -> list[torch.Tensor | None]:
    """Return the gradients in GradMask's order, None where not needed, in their tensors' dtypes.

    dy [...,N]; x, h and kept (y or z) are None if not needed. A bias that is not needed may be
    None too; its gradient then has the accumulator's dtype.
    """
    if routes is None:
        routes = dispatch.routes(dy, tensors, options)
    has_gain = tensors.magnitude is not None
    by_row = has_gain and options.axis == "out"
    row_gain = _gain_for("grad_output", tensors, routes) if by_row else None
    if by_row and needs.gain and options.keep == "recompute":
        kept = _inner(x, h, tensors, options, routes)
    sums = _output_grads(dy, h, kept, tensors, options, needs, row_gain, routes)
    (own,) = sums.adapters
    gain = sums.gain
    if has_gain and gain is None:
        is_made = isinstance(row_gain, torch.Tensor)
        gain = row_gain if is_made else _own_gain_of(routes["grad_output"], tensors)
    grads: dict[str, torch.Tensor | None] = {
        "lora_B": own.dB,
        "core": own.d_core,
        "out_scale": own.d_out_scale,
        "bias": sums.d_bias,
    }
    if needs.lora_bias:
        d_lora_bias = sums.d_bias * scaling_of(tensors, options)
        grads["lora_bias"] = d_lora_bias * gain if by_row else d_lora_bias
    low_rank = LowRankTerm(own.v, tensors.lora_A, tensors.seed, options.dropout)
    if options.dropout and needs.lora_A and needs.x:
        low_rank = low_rank._replace(shared=masks.shared(tokens(dy), tensors.weight.shape[-1]))
    if needs.lora_A:
        adapter_x = x
        if has_gain and not by_row:
            adapter_x = _inputs(x, tensors, options, routes)[0]
        (grads["lora_A"],) = routes["grad_project"].grad_project(adapter_x, [low_rank])
    if not has_gain and needs.x:
        base = BaseTerm(dy, tensors.weight)
        grads["x"] = routes["grad_input"].grad_input([base], [low_rank])
    elif by_row:
        if needs.gain:
            grads |= _gain_grads_by_row(sums, gain, tensors, options, needs, routes)
        if needs.x:
            grads["x"] = _d_x_by_row(dy, low_rank, gain, tensors, options, routes)
    elif has_gain and (needs.x or needs.gain):
        grads |= _in_axis_grads(dy, x, low_rank, gain, tensors, options, needs, routes)
    # GradMask's order is x and then LayerTensors' own, from the bias on.
    likes = (dy, *tensors[1 : len(GradMask._fields)])
    result: list[torch.Tensor | None] = []
    for name, need, like in zip(GradMask._fields, needs, likes, strict=True):
        grad = grads[name] if need else None
        if grad is not None and like is not None and grad.dtype != like.dtype:
            grad = grad.to(like.dtype)
        result.append(grad)
    return result


def resolve_keep(
    keep: str, options: CallOptions, trains_gain: bool, has_bias: bool, dtype: torch.dtype
) -> str:
    """The activation kept for d_magnitude: "output", "inner" or "recompute"; "none" if not needed.

    "auto" is "output" where that is exact enough (no bias, bf16 or fp32), because y costs nothing
    where its consumer saves it too.
    """
    if not trains_gain or options.axis == "in":
        return "none"
    if keep != "auto":
        return keep
    exact = not has_bias and not options.drops_base and dtype in (torch.bfloat16, torch.float32)
    return "output" if exact else "inner"


def saved_mask(needs: GradMask, options: CallOptions, has_gain: bool) -> SavedMask:
    """The activations that backward needs for these gradients. options.keep is resolved."""
    h = needs.lora_B or needs.core or needs.out_scale
    if not has_gain:
        return SavedMask(needs.lora_A, h, False, False)
    by_row = needs.gain and options.axis == "out"
    by_column = needs.gain and options.axis == "in"
    recomputed = by_row and options.keep == "recompute"
    return SavedMask(
        x=needs.lora_A or recomputed or by_column,
        h=h or recomputed,
        y=by_row and options.keep == "output",
        z=by_row and options.keep == "inner",
    )


def gain_of(magnitude: torch.Tensor | None, norm: torch.Tensor | None) -> torch.Tensor | None:
    """Return m/norm in the norm's dtype, 0 where the norm is 0; None without a magnitude."""
    if magnitude is None:
        return None
    if magnitude.dtype != norm.dtype:
        magnitude = magnitude.to(norm.dtype)
    # divide_or_zero, without its call: a DoRA layer comes here twice a step.
    return (magnitude / norm).masked_fill(norm == 0, 0)


def _gain_for(primitive: str, tensors: LayerTensors, routes: Routes) -> Any:
    """The gain for a primitive: a Gain if its backend divides, unless a bias is multiplied too."""
    backend = routes[primitive]
    divides = getattr(backend, f"{primitive.upper()}_DIVIDES", False)
    if divides and tensors.lora_bias is None:
        return Gain(tensors.magnitude, tensors.norm)
    return _own_gain_of(backend, tensors)


def _own_gain_of(backend: Backend, tensors: LayerTensors) -> torch.Tensor:
    """gain_of, by the backend's own kernel if it has one."""
    return getattr(backend, "gain_of", gain_of)(tensors.magnitude, tensors.norm)


def gain_grads(
    d_gain: torch.Tensor,
    gain: torch.Tensor,
    norm: torch.Tensor,
    by_gain: bool = False,
    want_norm: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the gradients of gain = m/norm: d_m = d_gain/norm, d_norm = -d_m·gain if wanted.

    by_gain: d_gain has to be divided by the gain first. A quotient by 0 is 0.
    """
    d_magnitude = divide_or_zero(divide_or_zero(d_gain, gain) if by_gain else d_gain, norm)
    return d_magnitude, -d_magnitude * gain if want_norm else None


def effective_B(tensors: LayerTensors, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return (out_scale⊙B)·core: the B [N,R] of the plain LoRA with the same delta, s apart.

    dtype: of the result; the accumulator's if not given.
    """
    wide = dtype or accumulator(tensors.weight.dtype)
    B = tensors.lora_B.to(wide)
    if tensors.core is not None:
        core = tensors.core.to(wide)
        B = B * core if core.dim() == 1 else B @ core
    return B if tensors.out_scale is None else B * tensors.out_scale.to(wide)[:, None]


def row_norm(tensors: LayerTensors, options: CallOptions) -> torch.Tensor:
    """Return ‖W + s·(out_scale⊙B)·core·A‖ along options.axis, a fresh tensor: [N] or [K]."""
    routes = dispatch.norm_routes(tensors, options)
    B = tensors.lora_B
    if tensors.core is not None or tensors.out_scale is not None:
        B = effective_B(tensors)
    scaling = options.scaling if tensors.scale is None else tensors.scale
    return routes["row_norm"].row_norm(tensors.weight, tensors.lora_A, B, scaling, options.axis)


def _inputs(
    x: torch.Tensor, tensors: LayerTensors, options: CallOptions, routes: Routes
) -> tuple[torch.Tensor, torch.Tensor]:
    """The inputs of a DoRA layer's adapter and of its base product.

    They are x itself, but for axis="in": gain⊙x for both, and with dropout on both
    x + (gain-1)⊙drop(x) for the base; and for axis="out" with dropout on both: drop(x) for the
    base.
    """
    base_x = x
    if options.drops_base:
        base_x = routes["drop"].drop(x, tensors.seed, options.dropout)
    if options.axis == "out":
        return x, base_x
    gain = _own_gain_of(routes["project"], tensors)
    adapter_x = torch.mul(x, gain, out=x.new_empty(x.shape))
    if not options.drops_base:
        return adapter_x, adapter_x
    return adapter_x, torch.addcmul(x, base_x, gain - 1, out=base_x)


def _total_bias(
    tensors: LayerTensors, options: CallOptions, gain: torch.Tensor | None
) -> torch.Tensor:
    """bias + s·gain⊙lora_bias in the accumulator's dtype.  [N]"""
    wide = accumulator(tensors.weight.dtype)
    bias = tensors.lora_bias.to(wide) * scaling_of(tensors, options)
    bias = bias if gain is None else bias * gain
    return bias if tensors.bias is None else bias + tensors.bias


def _output_grads(
    dy: torch.Tensor,
    h: torch.Tensor | None,
    kept: torch.Tensor | None,
    tensors: LayerTensors,
    options: CallOptions,
    needs: GradMask,
    gain: Any,
    routes: Routes,
) -> OutputGrads:
    """The sums over dy; gain is that of _gain_for, None unless it multiplies rows of y."""
    needs_dot = gain is not None and needs.gain
    in_axis_gain = needs.gain and gain is None
    spec = UpProjGradSpec(
        tensors.lora_B,
        options.scaling if tensors.scale is None else tensors.scale,
        tensors.out_scale,
        tensors.core,
        h,
        options.frozen_columns,
        needs.x or needs.lora_A or in_axis_gain,
        needs.lora_B,
        needs.core,
        needs.out_scale,
    )
    # Σ dy⊙kept is corrected by a bias: y contains the base's, z lacks the adapter's.
    correction = tensors.bias if options.keep == "output" else tensors.lora_bias
    want_bias = needs.bias or needs.lora_bias or (needs_dot and correction is not None)
    kept = kept if needs_dot else None
    if isinstance(gain, Gain) and needs_dot and correction is None:
        gain = gain._replace(by_gain=options.keep == "output", want_norm=needs.norm)
    return routes["grad_output"].grad_output(dy, [spec], gain, kept, want_bias)


def _inner(
    x: torch.Tensor,
    h: torch.Tensor,
    tensors: LayerTensors,
    options: CallOptions,
    routes: Routes,
) -> torch.Tensor:
    """z again, by one GEMM: what keep="inner" would have saved."""
    own_apply_core = getattr(routes["project"], "apply_core", apply_core)
    h_core = own_apply_core(h, tensors.core)
    up = UpProj(h_core, tensors.lora_B, scaling_of(tensors, options), tensors.out_scale)
    base_x = _inputs(x, tensors, options, routes)[1]
    return routes["linear"].linear(base_x, tensors.weight, [up])[0]


def _d_gain(sums: OutputGrads, tensors: LayerTensors, options: CallOptions) -> torch.Tensor:
    """Σ dy⊙z from z; from y = gain⊙z + bias it is gain⊙Σ dy⊙z.  [N]"""
    if options.keep == "output":
        return sums.dot if tensors.bias is None else sums.dot - tensors.bias * sums.d_bias
    if tensors.lora_bias is None:
        return sums.dot
    return sums.dot + tensors.lora_bias * scaling_of(tensors, options) * sums.d_bias


def _gain_grads_by_row(
    sums: OutputGrads,
    gain: torch.Tensor,
    tensors: LayerTensors,
    options: CallOptions,
    needs: GradMask,
    routes: Routes,
) -> dict[str, torch.Tensor | None]:
    """The gradients of a gain of rows, unless they were made with the sums."""
    if sums.of_gain is not None:
        return dict(zip(("magnitude", "norm"), sums.of_gain, strict=True))
    d_gain, by_gain = _d_gain(sums, tensors, options), options.keep == "output"
    return _gain_grads(d_gain, gain, by_gain, tensors, needs, routes)


def _gain_grads(
    d_gain: torch.Tensor,
    gain: torch.Tensor,
    by_gain: bool,
    tensors: LayerTensors,
    needs: GradMask,
    routes: Routes,
) -> dict[str, torch.Tensor | None]:
    """gain_grads by name, by the backend's own kernel if it has one."""
    own = getattr(routes["grad_output"], "gain_grads", gain_grads)
    d_magnitude, d_norm = own(d_gain, gain, tensors.norm, by_gain, needs.norm)
    return {"magnitude": d_magnitude, "norm": d_norm}


def _d_x_by_row(
    dy: torch.Tensor,
    low_rank: LowRankTerm,
    gain: torch.Tensor,
    tensors: LayerTensors,
    options: CallOptions,
    routes: Routes,
) -> torch.Tensor:
    grad_input, weight = routes["grad_input"].grad_input, tensors.weight
    if not options.drops_base:
        return grad_input([BaseTerm(dy, weight, gain)], [low_rank])
    # dx = dy W + mask⊙(((gain-1)⊙dy) W + v A): the correction and the adapter share one mask.
    through_drop = grad_input([BaseTerm(dy, weight, gain - 1)], [LowRankTerm(*low_rank[:2])])
    dropped = routes["drop"].drop(through_drop, tensors.seed, options.dropout)
    return grad_input([BaseTerm(dy, weight)], []).add_(dropped)


def _in_axis_grads(
    dy: torch.Tensor,
    x: torch.Tensor,
    low_rank: LowRankTerm,
    gain: torch.Tensor,
    tensors: LayerTensors,
    options: CallOptions,
    needs: GradMask,
    routes: Routes,
) -> dict[str, torch.Tensor | None]:
    """dx and the gradients of magnitude and norm through in_gain⊙x, for axis="in"."""
    base, grad_input = BaseTerm(dy, tensors.weight), routes["grad_input"].grad_input
    if not options.drops_base:
        d_scaled = grad_input([base], [low_rank])
        d_x = d_scaled * gain
    else:
        drop, (v, A, seed, p, _) = routes["drop"].drop, low_rank
        d_base = grad_input([base], [])
        dropped = drop(d_base, seed, p)
        dropped_part = drop(torch.mm(v, A.to(v.dtype)).view_as(d_base), seed, p)
        d_x = d_base + (gain - 1) * dropped + gain * dropped_part
        d_scaled = dropped + dropped_part
    grads: dict[str, torch.Tensor | None] = {"x": d_x}
    if needs.gain:
        d_gain = (d_scaled.to(gain.dtype) * x).reshape(tokens(x), x.shape[-1]).sum(0)
        grads |= _gain_grads(d_gain, gain, False, tensors, needs, routes)
    return grads
