"""oneDNN's product with a bias in bf16: the bits of torch.nn.functional.linear in less time.

torch writes the bias over all of y and lets oneDNN read it again, although oneDNN adds one by
itself; only compiled code asks it to. The bits are equal on AVX-512 processors, where both sum in
the same order; a processor with AMX tiles has not been tried.
"""

from __future__ import annotations

import functools

import torch

from lorafast.runtime import torch_internals

_op = functools.cache(torch_internals.onednn_bias_linear)


def is_available(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """True if oneDNN has such a product for these two tensors."""
    both_bf16 = x.dtype == weight.dtype == torch.bfloat16
    if not (both_bf16 and x.is_contiguous() and weight.is_contiguous()):
        return False
    return torch_internals.onednn_enabled() and _op() is not None


def has_bias_product() -> bool:
    """True if this torch and processor have such a product at all."""
    return _op() is not None


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Return x Wᵀ + bias.  x [...,K], weight [N,K], bias [N] -> y [...,N]"""
    return _op()(x, weight, bias, "none", [], "")
