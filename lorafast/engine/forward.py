"""The forward pass of one adapted layer as calls of primitives.

z = (in_gain⊙x) Wᵀ + s·out_scale⊙(core(drop(in_gain⊙x) Aᵀ) Bᵀ)        y = gain⊙z + bias
"""

from __future__ import annotations

import torch

from lorafast.engine import dispatch, weight_norm
from lorafast.engine.problem import (
    CallOptions,
    DownProj,
    LayerTensors,
    UpProj,
    accumulator,
    facts,
    scaling_of,
)


def forward(
    x: torch.Tensor, t: LayerTensors, c: CallOptions
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """y [...,N], h [M,R] and, with keep="inner", z [M,N] (else None): all fresh."""
    routes = dispatch.routes(facts(x, t, c))
    adapter_x, base_x = (x, x) if t.magnitude is None else inputs(x, t, c, routes)
    down = DownProj(t.lora_A, t.core, t.seed, c.dropout)
    ((h, mixed),) = routes["project"].project(adapter_x, [down])
    ups = [UpProj(mixed, t.lora_B, scaling_of(t, c), t.out_scale)]
    linear = routes["linear"].linear
    gain = (
        weight_norm.gain(t.magnitude, t.norm)
        if c.axis == "out" and t.magnitude is not None
        else None
    )
    bias = t.bias if t.lora_bias is None else bias_of(t, c, gain)
    y, z = linear(base_x, t.weight, ups, gain, bias, c.keep == "inner")
    if gain is not None and c.drops_base:
        # x Wᵀ + (gain-1)⊙drop(x) Wᵀ, written so that nothing large cancels however small or large the gain is.
        y += linear(x - base_x, t.weight, [])[0]
    return y, h, z


def inputs(
    x: torch.Tensor, t: LayerTensors, c: CallOptions, routes: dispatch.Routes
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the adapter and the base GEMM read: x itself, except where DoRA's gain or its dropout is on x's side of the GEMM.

    axis="in": gain⊙x for both, or x + (gain-1)⊙drop(x) for the base with dropout on both; axis="out" with it: drop(x).
    """
    if t.magnitude is None:
        return x, x
    base_x = routes["dropped"].dropped(x, t.seed, c.dropout) if c.drops_base else x
    if c.axis == "out":
        return x, base_x
    gain = weight_norm.gain(t.magnitude, t.norm)
    adapter_x = torch.mul(x, gain, out=x.new_empty(x.shape))
    return adapter_x, torch.addcmul(x, base_x, gain - 1, out=base_x) if c.drops_base else adapter_x


def bias_of(t: LayerTensors, c: CallOptions, gain: torch.Tensor | None) -> torch.Tensor | None:
    """bias + s·gain⊙lora_bias in the accumulator's dtype.  [N]"""
    if t.lora_bias is None:
        return t.bias
    wide = accumulator(t.weight.dtype)
    low = t.lora_bias.to(wide) * scaling_of(t, c)
    low = low if gain is None else low * gain
    return low if t.bias is None else low + t.bias
