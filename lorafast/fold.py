"""Folding a delta into a weight, and taking it out again: W' = gain⊙(W + s·(out_scale⊙B)·core·A), by panels of rows."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lorafast import arch, norm
from lorafast.problem import Settings, Tensors, accumulator

_PANEL_ROWS = 512


def fold(t: Tensors, c: Settings) -> None:
    """t.weight becomes W', each element rounded once. Needs t.norm where there is a magnitude."""
    gain, _ = _gains(t, c)

    def folded(W: torch.Tensor, delta: torch.Tensor, g: torch.Tensor | None) -> torch.Tensor:
        return W + delta if g is None else (W + delta) * g

    _panelwise(t, c, gain, folded)


def unfold(t: Tensors, c: Settings) -> None:
    """t.weight, which is W', becomes W to within ½ulp(W')/|gain| + ½ulp(W). The norm is the one it was folded with."""
    gain, zeros = _gains(t, c)
    if zeros:
        raise ValueError(
            f"the gain is 0 in {zeros} of {gain.numel()} places of weight {tuple(t.weight.shape)}: W cannot be read back"
        )

    def unfolded(W: torch.Tensor, delta: torch.Tensor, g: torch.Tensor | None) -> torch.Tensor:
        return W - delta if g is None else W / g - delta

    _panelwise(t, c, gain, unfolded)


def subtract(t: Tensors, c: Settings) -> None:
    """t.weight gives up the delta its adapter makes, gain apart: the residual start."""
    _panelwise(t, c, None, lambda W, delta, g: W - delta)


def add(t: Tensors, c: Settings) -> None:
    """The opposite of subtract."""
    _panelwise(t, c, None, lambda W, delta, g: W + delta)


def invertible(t: Tensors, c: Settings) -> bool:
    """Whether unfold could read W back."""
    return not _gains(t, c)[1]


def _gains(t: Tensors, c: Settings) -> tuple[torch.Tensor | None, int]:
    gain = norm.gain(t.magnitude, t.norm)
    return gain, 0 if gain is None else int((gain == 0).sum())


def _panelwise(t: Tensors, c: Settings, gain: torch.Tensor | None, rule: Callable) -> None:
    # fp64, so that the one rounding to W's dtype is the only one that counts.
    wide = torch.float64 if arch.has_fp64(t.weight.device) else accumulator(t.weight.dtype)
    A, B, s = t.lora_A.to(wide), norm.effective_B(t, wide), norm.scaling(t, c)
    gain = None if gain is None else gain.to(wide)
    for start in range(0, t.weight.shape[0], _PANEL_ROWS):
        rows = slice(start, start + _PANEL_ROWS)
        panel_gain = gain if gain is None or c.axis == "in" else gain[rows, None]
        t.weight[rows] = rule(t.weight[rows].to(wide), (B[rows] * s) @ A, panel_gain).to(t.weight.dtype)
