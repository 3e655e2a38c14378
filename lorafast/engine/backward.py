"""The backward pass of one adapted layer as calls of primitives: only the gradients asked for."""

from __future__ import annotations

import torch

from lorafast.engine import dispatch, reference, weight_norm
from lorafast.engine.dispatch import Routes
from lorafast.engine.forward import inputs
from lorafast.engine.problem import (
    BaseTerm,
    CallOptions,
    GradMask,
    LayerTensors,
    LowRankTerm,
    OutputGrads,
    UpProj,
    UpProjGradSpec,
    facts,
    scaling_of,
    tokens,
)


def backward(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    h: torch.Tensor | None,
    kept: torch.Tensor | None,
    t: LayerTensors,
    c: CallOptions,
    w: GradMask,
) -> list[torch.Tensor | None]:
    """Wants' gradients, None where not wanted, each in its tensor's dtype.  dy [...,N]; x, h and kept (y or z) None if not needed.

    A bias that is not needed may be None too; its gradient then comes in the accumulator's dtype.
    """
    routes = dispatch.routes(facts(dy, t, c))
    by_row = t.magnitude is not None and c.axis == "out"
    gain = weight_norm.gain(t.magnitude, t.norm)
    if by_row and w.gain and c.keep == "recompute":
        kept = _inner(x, h, t, c, routes)
    needs_v = w.x or w.lora_A or (w.gain and not by_row)
    back = UpProjGradSpec(
        t.lora_B,
        scaling_of(t, c),
        t.out_scale,
        t.core,
        h,
        c.frozen_columns,
        needs_v,
        w.lora_B,
        w.core,
        w.out_scale,
    )
    sums: OutputGrads = routes["grad_output"].grad_output(
        dy,
        [back],
        gain if by_row else None,
        kept if by_row and w.gain else None,
        want_bias=w.bias or w.lora_bias or (by_row and w.gain and _bias_in_dot(t, c)),
    )
    (own,) = sums.adapters
    found: dict[str, torch.Tensor] = {
        "lora_B": own.dB,
        "core": own.d_core,
        "out_scale": own.d_out_scale,
        "bias": sums.d_bias,
    }
    if w.lora_bias:
        d_lora_bias = sums.d_bias * scaling_of(t, c)
        found["lora_bias"] = d_lora_bias * gain if by_row else d_lora_bias
    if w.lora_A:
        low = LowRankTerm(own.v, t.lora_A, t.seed, c.dropout)
        (found["lora_A"],) = routes["grad_project"].grad_project(inputs(x, t, c, routes)[0], [low])
    if by_row:
        if w.gain:
            found |= _gain_grads(_d_gain(sums, t, c, gain), gain, t, w)
        if w.x:
            found["x"] = _d_x_by_row(dy, own.v, gain, t, c, routes)
    elif t.magnitude is not None:
        if w.x or w.gain:
            found |= _in_axis(dy, x, own.v, gain, t, c, w, routes)
    elif w.x:
        found["x"] = _d_x(dy, t, routes, LowRankTerm(own.v, t.lora_A, t.seed, c.dropout))
    # Wants' order is x and then Tensors' own, from the bias on.
    likes = (dy, *t[1 : len(GradMask._fields)])
    return [
        _as(found[name], like) if wanted else None
        for name, wanted, like in zip(GradMask._fields, w, likes, strict=True)
    ]


def _as(gradient: torch.Tensor, like: torch.Tensor | None) -> torch.Tensor:
    return gradient if like is None or gradient.dtype == like.dtype else gradient.to(like.dtype)


def _inner(
    x: torch.Tensor, h: torch.Tensor, t: LayerTensors, c: CallOptions, routes: Routes
) -> torch.Tensor:
    """z again, one GEMM: what keep="inner" would have saved."""
    up = UpProj(reference.mix(h, t.core), t.lora_B, scaling_of(t, c), t.out_scale)
    return routes["linear"].linear(inputs(x, t, c, routes)[1], t.weight, [up])[0]


def _bias_in_dot(t: LayerTensors, c: CallOptions) -> bool:
    """Whether Σ dy⊙kept has to be corrected by a bias: y contains the base's, z lacks the adapter's."""
    return t.bias is not None if c.keep == "output" else t.lora_bias is not None


def _d_gain(sums: OutputGrads, t: LayerTensors, c: CallOptions, gain: torch.Tensor) -> torch.Tensor:
    """Σ dy⊙z, from z or from y = gain⊙z + bias (0 where the gain is 0).  [N]"""
    if c.keep == "output":
        dot = sums.dot if t.bias is None else sums.dot - t.bias * sums.d_bias
        return weight_norm.divided(dot, gain)
    if t.lora_bias is None:
        return sums.dot
    return sums.dot + t.lora_bias * scaling_of(t, c) * sums.d_bias


def _gain_grads(
    d_gain: torch.Tensor, gain: torch.Tensor, t: LayerTensors, w: GradMask
) -> dict[str, torch.Tensor]:
    """gain = m/norm: d_m = d_gain/norm, d_norm = -d_gain·gain/norm."""
    d_magnitude = weight_norm.divided(d_gain, t.norm)
    return {"magnitude": d_magnitude} | ({"norm": -d_magnitude * gain} if w.norm else {})


def _d_x(
    dy: torch.Tensor,
    t: LayerTensors,
    routes: Routes,
    low: LowRankTerm | None,
    gain: torch.Tensor | None = None,
) -> torch.Tensor:
    lows = [] if low is None else [low]
    return routes["grad_input"].grad_input([BaseTerm(dy, t.weight, gain)], lows)


def _d_x_by_row(
    dy: torch.Tensor,
    v: torch.Tensor,
    gain: torch.Tensor,
    t: LayerTensors,
    c: CallOptions,
    routes: Routes,
) -> torch.Tensor:
    if not c.drops_base:
        return _d_x(dy, t, routes, LowRankTerm(v, t.lora_A, t.seed, c.dropout), gain)
    # dx = dy W + mask⊙(((gain-1)⊙dy) W + v A): the correction and the adapter share one mask.
    through_drop = _d_x(dy, t, routes, LowRankTerm(v, t.lora_A), gain - 1)
    return _d_x(dy, t, routes, None).add_(
        routes["dropped"].dropped(through_drop, t.seed, c.dropout)
    )


def _in_axis(
    dy: torch.Tensor,
    x: torch.Tensor,
    v: torch.Tensor,
    gain: torch.Tensor,
    t: LayerTensors,
    c: CallOptions,
    w: GradMask,
    routes: Routes,
) -> dict[str, torch.Tensor]:
    """axis="in": dx and the gradients of magnitude and norm through in_gain⊙x."""
    if not c.drops_base:
        d_scaled = _d_x(dy, t, routes, LowRankTerm(v, t.lora_A, t.seed, c.dropout))
        d_x = d_scaled * gain
    else:
        base = _d_x(dy, t, routes, None)
        dropped = routes["dropped"].dropped(base, t.seed, c.dropout)
        low_rank = routes["dropped"].dropped(
            torch.mm(v, t.lora_A.to(v.dtype)).view_as(base), t.seed, c.dropout
        )
        d_x = base + (gain - 1) * dropped + gain * low_rank
        d_scaled = dropped + low_rank
    found = {"x": d_x}
    if w.gain:
        d_gain = (d_scaled.to(gain.dtype) * x).reshape(tokens(x), x.shape[-1]).sum(0)
        found |= _gain_grads(d_gain, gain, t, w)
    return found
