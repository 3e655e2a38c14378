"""The exact gradients of DoRA's norm for A, B, core and out_scale, by rows of W."""

from __future__ import annotations

import torch

from lorafast.engine.formula import effective_B
from lorafast.engine.precision import accumulator, divide_or_zero
from lorafast.engine.problem import CallOptions, GradMask, LayerTensors, scaling_of
from lorafast.engine.row_blocks import row_blocks


def row_norm_backward(
    d_norm: torch.Tensor,
    norm: torch.Tensor,
    tensors: LayerTensors,
    options: CallOptions,
    needs: GradMask,
) -> list[torch.Tensor]:
    """Return the gradients of row_norm for A, B, core and out_scale, in GradMask's order.

    With V = W + sB'A, B' = (out_scale⊙B)·core and D = diag(d_norm/norm) V (columns instead of
    rows for axis="in"): dA = s B'ᵀ D and dB' = s D Aᵀ, both from one pass over W.
    d_norm, norm [N] or [K]
    """
    wide, s = accumulator(tensors.weight.dtype), scaling_of(tensors, options)
    A, B = tensors.lora_A.to(wide), effective_B(tensors, wide)
    dA, dB = torch.zeros_like(A), torch.zeros_like(B)
    share = divide_or_zero(d_norm, norm)
    for rows in row_blocks(tensors.weight):
        D = torch.addmm(tensors.weight[rows].to(wide), B[rows] * s, A)
        D *= share[rows, None] if options.axis == "out" else share
        dA += B[rows].t() @ D
        dB[rows] = D @ A.t()
    grads = {"lora_A": dA * s, **_split_effective_B(dB * s, tensors, wide)}
    like = tensors._asdict()
    return [grads[name].to(like[name].dtype) for name in needs.names]


def _split_effective_B(
    d_effective: torch.Tensor, tensors: LayerTensors, wide: torch.dtype
) -> dict[str, torch.Tensor]:
    """The gradients of B, core and out_scale from that of (out_scale⊙B)·core."""
    B = tensors.lora_B.to(wide)
    scale = 1 if tensors.out_scale is None else tensors.out_scale.to(wide)[:, None]
    d_scaled, grads = d_effective, {}
    if tensors.core is not None:
        core, diagonal = tensors.core.to(wide), tensors.core.dim() == 1
        scaled = B * scale
        grads["core"] = (d_effective * scaled).sum(0) if diagonal else scaled.t() @ d_effective
        d_scaled = d_effective * core if diagonal else d_effective @ core.t()
    grads["lora_B"] = d_scaled * scale
    if tensors.out_scale is not None:
        grads["out_scale"] = (d_scaled * B).sum(1)
    return grads
