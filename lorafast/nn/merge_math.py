"""W' = gain⊙(W + s·(out_scale⊙B)·core·A), and back: what merge and unmerge compute.

Nothing is changed in place. Of experts, every tensor has a leading dim [E,...].
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from lorafast.engine.formula import effective_B, gain_of
from lorafast.engine.grouped.groups import of_expert
from lorafast.engine.precision import accumulator
from lorafast.engine.problem import CallOptions, LayerTensors, scaling_of
from lorafast.engine.row_blocks import row_blocks
from lorafast.runtime import devices

Rule = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


def merged_weight(tensors: LayerTensors, options: CallOptions) -> torch.Tensor:
    """Return W', each element rounded once. A magnitude needs tensors.norm."""

    def rule(W: torch.Tensor, delta: torch.Tensor, gain: torch.Tensor | None) -> torch.Tensor:
        return W + delta if gain is None else (W + delta) * gain

    return _by_rows(tensors, options, gain_of(tensors.magnitude, tensors.norm), rule)


def merged_bias(tensors: LayerTensors, options: CallOptions) -> torch.Tensor:
    """Return bias + s·gain⊙lora_bias, each element rounded once.

    axis="in" has no gain here.
    """
    gain, wide = gain_of(tensors.magnitude, tensors.norm), _wide(tensors)
    added = tensors.lora_bias.to(wide) * scaling_of(tensors, options)
    if gain is not None and options.axis == "out":
        added = added * gain
    return (tensors.bias.to(wide) + added).to(tensors.bias.dtype)


def unmerged_weight(tensors: LayerTensors, options: CallOptions) -> torch.Tensor:
    """Return W from tensors.weight = W', to within ½ulp(W')/|gain| + ½ulp(W).

    The norm is the one that W' was computed with.
    """

    def rule(W: torch.Tensor, delta: torch.Tensor, gain: torch.Tensor | None) -> torch.Tensor:
        return W - delta if gain is None else W / gain - delta

    return _by_rows(tensors, options, gain_of(tensors.magnitude, tensors.norm), rule)


def subtract_delta(tensors: LayerTensors, options: CallOptions) -> torch.Tensor:
    """Return W without the delta of its adapter, gain apart: a residual start."""
    return _by_rows(tensors, options, None, lambda W, delta, _: W - delta)


def add_delta(tensors: LayerTensors, options: CallOptions) -> torch.Tensor:
    """Return W with the delta of its adapter, gain apart."""
    return _by_rows(tensors, options, None, lambda W, delta, _: W + delta)


def is_invertible(tensors: LayerTensors) -> bool:
    """True if unmerged_weight can give W back: no gain is 0, infinite or NaN."""
    gain = gain_of(tensors.magnitude, tensors.norm)
    return gain is None or bool((gain.isfinite() & (gain != 0)).all())


def _wide(tensors: LayerTensors) -> torch.dtype:
    # fp64, so that the one rounding to W's dtype is the only one that counts.
    weight = tensors.weight
    return torch.float64 if devices.has_fp64(weight.device) else accumulator(weight.dtype)


def _by_rows(
    tensors: LayerTensors, options: CallOptions, gain: torch.Tensor | None, rule: Rule
) -> torch.Tensor:
    weight, wide = tensors.weight, _wide(tensors)
    if weight.dim() == 3:
        out = torch.empty_like(weight)
        for expert, own in enumerate(out):
            own_gain = None if gain is None else gain[expert]
            own.copy_(_by_rows(of_expert(tensors, expert), options, own_gain, rule))
        return out
    A, B, s = tensors.lora_A.to(wide), effective_B(tensors, wide), scaling_of(tensors, options)
    gain = None if gain is None else gain.to(wide)
    out = torch.empty_like(weight)
    for rows in row_blocks(weight):
        by_row = gain is not None and options.axis == "out"
        out[rows] = rule(
            weight[rows].to(wide), (B[rows] * s) @ A, gain[rows, None] if by_row else gain
        )
    return out
