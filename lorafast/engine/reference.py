"""The formula in plain, differentiable torch.

A trained weight runs on it, and double backward, torch.func transforms and forward-mode AD can use
it. No backend imports it.

z = (in_gain⊙x) Wᵀ + s·out_scale⊙(core(drop(in_gain⊙x) Aᵀ) Bᵀ)        y = gain⊙z + bias
"""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F

from lorafast.engine import philox
from lorafast.engine.precision import accumulator, activation_dtype, apply_core
from lorafast.engine.problem import Scaling


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    core: torch.Tensor | None = None,
    magnitude: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    axis: str = "out",
    out_scale: torch.Tensor | None = None,
    lora_bias: torch.Tensor | None = None,
    scaling: Scaling = 1.0,
    dropout: float = 0.0,
    dropout_on: str = "adapter",
    keep: str = "auto",
    frozen_columns: int = 0,
    seed: torch.Tensor | None = None,
    training: bool = True,
) -> torch.Tensor:
    """Return the output of lorafast.linear by plain torch ops, on plain autograd.

    The arguments are those of lorafast.linear, and the same seed drops the same elements. keep is
    ignored: autograd keeps what it needs.

    Returns:
        y [...,N] in the dtype of the call.

    Example:
        x, weight = torch.randn(3, 6, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
        A, B = torch.randn(2, 6, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
        function = lambda A: lorafast.reference.linear(x, weight, None, A, B)
        jacobian = torch.func.jacrev(function)(A)

    Source:
        arXiv:2106.09685, arXiv:2402.09353, arXiv:2406.12832
    """
    x = x.to(activation_dtype(x))
    p = dropout if training else 0.0
    dropped = x
    if p:
        seed = philox.draw_seed(x.device) if seed is None else seed
        dropped = philox.differentiable_drop(x, seed, p)
    return _linear(
        x, dropped, weight, bias, lora_A, lora_B, core, magnitude, norm, axis, out_scale, lora_bias,
        scaling, p, dropout_on, frozen_columns,
    )  # fmt: skip


def grouped_linear(
    x: torch.Tensor,
    offsets: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    core: torch.Tensor | None = None,
    magnitude: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    axis: str = "out",
    out_scale: torch.Tensor | None = None,
    lora_bias: torch.Tensor | None = None,
    scaling: Scaling = 1.0,
    dropout: float = 0.0,
    dropout_on: str = "adapter",
    keep: str = "auto",
    frozen_columns: int = 0,
    seed: torch.Tensor | None = None,
    training: bool = True,
    rows: torch.Tensor | None = None,
    detach_norm: bool = True,
) -> torch.Tensor:
    """Return the output of lorafast.grouped_linear by a loop over experts, on plain autograd.

    The arguments are those of lorafast.grouped_linear, and the same seed drops the same elements.
    The host reads the offsets. detach_norm=False gives the norm its gradient.

    Returns:
        y [S,N] in the dtype of the call.

    Example:
        x, weight = torch.randn(5, 6), torch.randn(2, 4, 6)
        offsets = torch.tensor([0, 2, 5], dtype=torch.int32)
        A, B = torch.randn(2, 3, 6), torch.randn(2, 4, 3)
        y = lorafast.reference.grouped_linear(x, offsets, weight, None, A, B)
    """
    x = x.to(activation_dtype(x))
    p = dropout if training else 0.0
    dropped = x
    if p:
        seed = philox.draw_seed(x.device) if seed is None else seed
        index = torch.arange(x.shape[0], device=x.device) if rows is None else rows
        mask = philox.keep_mask_of_rows(seed, p, index, x.shape[1])
        dropped = torch.where(mask, x * philox.scale(p), 0.0)
    bounds, parts = offsets.tolist(), []
    for e in range(weight.shape[0]):
        own = slice(bounds[e], bounds[e + 1])
        A, B = (factor if factor.dim() == 2 else factor[e] for factor in (lora_A, lora_B))
        given = (bias, core, magnitude, norm, out_scale, lora_bias)
        own_bias, own_core, own_magnitude, own_norm, own_scale, own_lora_bias = (
            None if one is None else one[e] for one in given
        )
        if own_magnitude is not None and own_norm is None and not detach_norm:
            own_norm = row_norm(weight[e], A, B, own_core, own_scale, scaling, axis)
        y = _linear(
            x[own], dropped[own], weight[e], own_bias, A, B, own_core, own_magnitude, own_norm,
            axis, own_scale, own_lora_bias, scaling, p, dropout_on, frozen_columns,
        )  # fmt: skip
        parts.append(y)
    return torch.cat(parts)


def row_norm(
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    core: torch.Tensor | None = None,
    out_scale: torch.Tensor | None = None,
    scaling: Scaling = 1.0,
    axis: str = "out",
) -> torch.Tensor:
    """Return ‖W + s·(out_scale⊙B)·core·A‖ along axis, on plain autograd.

    The arguments are those of lorafast.functional.row_norm.

    Returns:
        The norm, [N] or [K], in fp32, or in fp64 for an fp64 weight.

    Example:
        weight, A, B = torch.randn(5, 6), torch.randn(2, 6), torch.zeros(5, 2)
        norm = lorafast.reference.row_norm(weight, A, B)
    """
    wide = accumulator(weight.dtype)
    with _without_autocast(weight.device):
        B = _factor(lora_B.to(wide), scaling, out_scale)
        if core is not None:
            B = B * core.to(wide) if core.dim() == 1 else B @ core.to(wide)
        return torch.linalg.vector_norm(
            weight.to(wide) + B @ lora_A.to(wide), dim=1 if axis == "out" else 0
        )


def _linear(
    x: torch.Tensor,
    dropped: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    core: torch.Tensor | None,
    magnitude: torch.Tensor | None,
    norm: torch.Tensor | None,
    axis: str,
    out_scale: torch.Tensor | None,
    lora_bias: torch.Tensor | None,
    scaling: Scaling,
    p: float,
    dropout_on: str,
    frozen_columns: int,
) -> torch.Tensor:
    """The formula of one layer, of x in the dtype of the call and dropped = drop(x)."""
    with _without_autocast(x.device):
        if frozen_columns:
            lora_B = torch.cat(
                (lora_B[:, :frozen_columns].detach(), lora_B[:, frozen_columns:]), dim=1
            )
        if magnitude is not None and norm is None:
            norm = row_norm(weight, lora_A, lora_B, core, out_scale, scaling, axis).detach()
        gain = None if magnitude is None else _gain(magnitude, norm)
        base_x = x
        if axis == "in" and gain is not None:
            base_x = (gain * x if dropout_on == "adapter" else x + (gain - 1) * dropped).to(x.dtype)
            dropped, gain = (gain * dropped).to(x.dtype), None
        factor = _factor(lora_B, scaling, out_scale).to(x.dtype)
        h_core = apply_core(F.linear(dropped, lora_A.to(x.dtype)), core)
        low_rank = F.linear(h_core, factor)
        if lora_bias is not None:
            low_rank = low_rank + (lora_bias * scaling).to(x.dtype)
        weight = weight.to(x.dtype)
        y = F.linear(base_x, weight) + low_rank
        if gain is not None and p and dropout_on == "both":
            y = y + ((gain - 1) * (F.linear(dropped, weight) + low_rank)).to(x.dtype)
        elif gain is not None:
            y = (gain * y).to(x.dtype)
        return y if bias is None else y + bias.to(x.dtype)


def _without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    # The meta device knows no autocast, on or off; and an exported program should hold no region
    # without it where it is off anyway.
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def _factor(lora_B: torch.Tensor, scaling: Scaling, out_scale: torch.Tensor | None) -> torch.Tensor:
    wide = lora_B.to(accumulator(lora_B.dtype)) * scaling
    return wide if out_scale is None else wide * out_scale[:, None]


def _gain(magnitude: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    # Dividing by 1 where the norm is 0 keeps the gradient of the unused branch finite.
    zero = norm == 0
    return torch.where(
        zero,
        torch.zeros_like(norm),
        magnitude.to(norm.dtype) / torch.where(zero, torch.ones_like(norm), norm),
    )
