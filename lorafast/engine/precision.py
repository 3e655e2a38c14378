"""The dtypes that a call computes in, and where it rounds."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums run in: fp64 for fp64, fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def low_rank_grad_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of u and v, the gradients [M,R] of h' and h, beside an activation of this dtype.

    fp32 for fp16, whose range is too narrow for them: with a mean over a few thousand tokens half
    of v would be 0.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def scaled_to_fp16(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tensor·2ᵏ in fp16 and 2⁻ᵏ [], with the k that brings the largest element near 2¹⁴.

    It makes an fp32 tensor an operand of a product on tensor cores. Nothing waits for the device.
    """
    if not tensor.numel():
        return tensor.half(), tensor.new_ones((), dtype=torch.float32)
    largest = torch.linalg.vector_norm(tensor.float(), math.inf)
    # A power of two within fp32's range, and none for inf and nan, which stay what they are.
    exponent = torch.where(largest.isfinite(), torch.frexp(largest)[1], 0).clamp_(-100, 100)
    one = torch.ones_like(largest)
    return (tensor * torch.ldexp(one, 14 - exponent)).half(), torch.ldexp(one, exponent - 14)


def activation_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of a call: autocast's if it is on for x's device and x is not fp64, else x's."""
    device = "cpu" if x.is_cpu else x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return x.dtype
    if x.dtype == torch.float64 or not x.is_floating_point():
        return x.dtype
    return torch.get_autocast_dtype(device)


def narrowest_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The narrowest dtype that holds every value: a cast to it and back has rounded nothing."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if torch.equal(tensor.to(dtype).to(tensor.dtype), tensor):
            return dtype
    return tensor.dtype


def apply_core(h: torch.Tensor, core: torch.Tensor | None) -> torch.Tensor:
    """h' = h coreᵀ, or h⊙core for a diagonal, rounded once to h's dtype.  h [...,R]"""
    if core is None:
        return h
    return h * core.to(h.dtype) if core.dim() == 1 else F.linear(h, core.to(h.dtype))


def divide_or_zero(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a/b, 0 where b is 0."""
    return (a / b).masked_fill(b == 0, 0)
