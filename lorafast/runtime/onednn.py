"""oneDNN's own product with a bias, in bf16: what torch.nn.functional.linear computes, sooner.

torch lays the bias all over y and has oneDNN read it again, although oneDNN adds one on its own; only compiled code asks it to.
The bits are the same on an AVX-512 processor, where both add up alike; one with AMX tiles has not been tried.
"""

from __future__ import annotations

import functools

import torch


def serves(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether there is such a product for these."""
    alike = (
        x.dtype == weight.dtype == torch.bfloat16 and x.is_contiguous() and weight.is_contiguous()
    )
    return alike and torch._C._get_mkldnn_enabled() and _op() is not None


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """x Wᵀ + bias.  x [...,K], weight [N,K], bias [N] -> y [...,N]"""
    return _op()(x, weight, bias, "none", [], "")


@functools.cache
def _op() -> torch._ops.OpOverload | None:
    """The op, if this torch and this processor have it. It is not public, and torch may take it away."""
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    return getattr(getattr(torch.ops.mkldnn, "_linear_pointwise", None), "default", None)
