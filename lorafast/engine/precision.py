"""The dtypes that a call computes in, and where it rounds."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums run in: fp64 for fp64, fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def activation_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of a call: autocast's if it is on for x's device and x is not fp64, else x's."""
    device = "cpu" if x.is_cpu else x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return x.dtype
    if x.dtype == torch.float64 or not x.is_floating_point():
        return x.dtype
    return torch.get_autocast_dtype(device)


def apply_core(h: torch.Tensor, core: torch.Tensor | None) -> torch.Tensor:
    """h' = h coreᵀ, or h⊙core for a diagonal, rounded once to h's dtype.  h [...,R]"""
    if core is None:
        return h
    return h * core.to(h.dtype) if core.dim() == 1 else F.linear(h, core.to(h.dtype))


def divide_or_zero(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a/b, 0 where b is 0."""
    return (a / b).masked_fill(b == 0, 0)
