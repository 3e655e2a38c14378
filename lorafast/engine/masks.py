"""Dropout for the backend in plain torch: by one kernel where it may serve, else by a mask.

The kernel makes the mask in registers. As a tensor it is made in blocks of rows, and once for the
primitives of one backward where keeping it meanwhile pays. All drop the elements of
lorafast.engine.philox.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch

from lorafast.engine import cuda_forms, philox, row_blocks, trial
from lorafast.engine.problem import SharedMask
from lorafast.engine.row_blocks import flatten_tokens
from lorafast.engine.trial_forms import CUDA
from lorafast.runtime import devices, env

# The kernels of the cuda backend that a step with dropout launches.
_DROPPING = ("project", "grad_project", "low_rank_add")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def shared(M: int, K: int) -> SharedMask | None:
    """What two primitives of a backward share a mask by; None where each makes it by itself.

    To make a mask moves some 70 bytes an element, and to keep it 2; but none is kept that is larger
    than the blocks in which the backend works on a GPU.
    """
    return SharedMask() if M * K <= row_blocks.ELEMENTS else None


def drop(x: torch.Tensor, seed: torch.Tensor, p: float) -> torch.Tensor:
    """Return drop(x).  x [...,K] -> fresh, dense"""
    kernel = _kernel_for(x)
    if kernel is None:
        return philox.drop(x, seed, p)
    out, x2 = x.new_empty(x.shape), flatten_tokens(x)
    kernel(out.view(x2.shape), x2, seed, p)
    return out


def drop_rows(
    x2: torch.Tensor, rows: slice, seed: torch.Tensor, p: float, shared: SharedMask | None = None
) -> torch.Tensor:
    """Return rows of drop(x) before its scale: dropped elements are zero, nothing is rounded."""
    kernel = _kernel_for(x2)
    if kernel is None:
        return torch.where(_mask_of(x2, rows, seed, p, shared), x2[rows], 0.0)
    out = x2.new_empty(rows.stop - rows.start, x2.shape[1])
    kernel(out, x2[rows], seed, p, rows.start, scaled=False)
    return out


def add_rows(
    out2: torch.Tensor,
    rows: slice,
    part: torch.Tensor,
    seed: torch.Tensor,
    p: float,
    started: bool,
    shared: SharedMask | None = None,
) -> None:
    """Compute rows of out = out (if started) + mask⊙part·scale, rounded once.

    part is in the accumulator's dtype, and is overwritten.
    """
    kernel, out = _kernel_for(out2), out2[rows]
    if kernel is not None:
        kernel(out, part, seed, p, rows.start, accumulate=started)
        return
    mask = _mask_of(out2, rows, seed, p, shared)
    torch.where(mask, part, part.new_zeros(()), out=part)
    if started:
        torch.add(out, part, alpha=philox.scale(p), out=out)
    else:
        torch.mul(part, philox.scale(p), out=out)


def kernel_serves(device: torch.device, dtype: torch.dtype) -> bool:
    """True if the kernel may drop numbers of this dtype there: it is asked for, or was tried."""
    return not why_not_kernel(device, dtype)


def why_not_kernel(device: torch.device, dtype: torch.dtype) -> str:
    """Why the kernel may not drop numbers of this dtype there, in words; "" if it may."""
    asked = env.backend()
    if dtype not in _DTYPES:
        return f"it drops no {dtype}"
    if asked not in ("auto", "triton"):
        return f"{env.BACKEND.name}={asked}"
    if device.type == "cpu":
        # Triton's interpreter computes bf16 wrongly.
        interprets = env.interprets() and dtype != torch.bfloat16
        return "" if interprets else "it runs on a CPU in Triton's interpreter only"
    if device.type not in ("cuda", "xpu"):
        return f"it does not run on {device.type}"
    return "" if asked == "triton" else trial.why_not("drop", dtype, 0, device)


def made_by_torch(device: torch.device, dtype: torch.dtype) -> bool:
    """True on a GPU where the kernel may not serve, nor the cuda backend, which makes its own bits.

    A step with dropout is then modelled at 3.7 times the frozen layer's at 4096 → 4096, and at more
    on smaller layers (docs/modelled-steps.md). Beside that every right kernel is faster.
    """
    if device.type in ("cpu", "meta") or env.is_forced("cuda") or kernel_serves(device, dtype):
        return False
    if env.backend() != "auto":
        return True
    wrong = any(trial.why_not(kernel, dtype, 1, device, CUDA) for kernel in _DROPPING)
    return wrong or bool(cuda_forms.why_not())


def _kernel_for(x: torch.Tensor) -> Callable | None:
    """kernels.drop.drop, if it is there and may serve; else None."""
    if x.is_meta:
        modelled = devices.stand_in.get()
        return modelled and modelled.drop
    return _load() if kernel_serves(x.device, x.dtype) else None


@functools.cache
def _load() -> Callable | None:
    # Without Triton, or with a broken one, torch's operations serve.
    try:
        return importlib.import_module("lorafast.engine.kernels.drop").drop
    except Exception:
        return None


def _mask_of(
    x2: torch.Tensor, rows: slice, seed: torch.Tensor, p: float, shared: SharedMask | None
) -> torch.Tensor:
    """The mask of some rows of an activation or of its gradient."""
    M, K = x2.shape
    if shared is None:
        return philox.keep_mask(seed, p, rows, K)
    if shared.mask is None:
        shared.mask = philox.keep_mask(seed, p, slice(0, M), K)
    return shared.mask[rows]
