"""Folding a delta into a weight, and taking it out again: W' = gain⊙(W + s·(out_scale⊙B)·core·A). Nothing is changed in place."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lorafast.engine import weight_norm
from lorafast.engine.problem import CallOptions, LayerTensors, accumulator, scaling_of
from lorafast.engine.row_blocks import row_blocks
from lorafast.runtime import devices


def fold(t: LayerTensors, c: CallOptions) -> torch.Tensor:
    """W', each element rounded once. A magnitude needs t.norm."""

    def folded(W: torch.Tensor, delta: torch.Tensor, g: torch.Tensor | None) -> torch.Tensor:
        return W + delta if g is None else (W + delta) * g

    return _by_panels(t, c, weight_norm.gain(t.magnitude, t.norm), folded)


def fold_bias(t: LayerTensors, c: CallOptions) -> torch.Tensor:
    """bias + s·gain⊙lora_bias, each element rounded once (axis="in" has no gain here)."""
    gain, wide = weight_norm.gain(t.magnitude, t.norm), _wide(t)
    low = t.lora_bias.to(wide) * scaling_of(t, c)
    return (t.bias.to(wide) + (low if gain is None or c.axis == "in" else low * gain)).to(
        t.bias.dtype
    )


def unfold(t: LayerTensors, c: CallOptions) -> torch.Tensor:
    """W from t.weight = W', to within ½ulp(W')/|gain| + ½ulp(W). The norm is the one it was folded with."""

    def unfolded(W: torch.Tensor, delta: torch.Tensor, g: torch.Tensor | None) -> torch.Tensor:
        return W - delta if g is None else W / g - delta

    return _by_panels(t, c, weight_norm.gain(t.magnitude, t.norm), unfolded)


def subtract(t: LayerTensors, c: CallOptions) -> torch.Tensor:
    """W without the delta its adapter makes, gain apart: the residual start."""
    return _by_panels(t, c, None, lambda W, delta, _: W - delta)


def add(t: LayerTensors, c: CallOptions) -> torch.Tensor:
    """The opposite of subtract."""
    return _by_panels(t, c, None, lambda W, delta, _: W + delta)


def invertible(t: LayerTensors) -> bool:
    """Whether unfold could read W back: no gain is 0, infinite or NaN."""
    gain = weight_norm.gain(t.magnitude, t.norm)
    return gain is None or bool((gain.isfinite() & (gain != 0)).all())


def _wide(t: LayerTensors) -> torch.dtype:
    # fp64, so that the one rounding to W's dtype is the only one that counts.
    return torch.float64 if devices.has_fp64(t.weight.device) else accumulator(t.weight.dtype)


def _by_panels(
    t: LayerTensors, c: CallOptions, gain: torch.Tensor | None, rule: Callable
) -> torch.Tensor:
    wide, out = _wide(t), torch.empty_like(t.weight)
    A, B, s = t.lora_A.to(wide), weight_norm.effective_B(t, wide), scaling_of(t, c)
    gain = None if gain is None else gain.to(wide)
    for rows in row_blocks(t.weight):
        panel_gain = gain if gain is None or c.axis == "in" else gain[rows, None]
        out[rows] = rule(t.weight[rows].to(wide), (B[rows] * s) @ A, panel_gain)
    return out
