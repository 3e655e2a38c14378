"""Weights in 4 bits made dense: code[index] · absmax of the block, in fp32 and rounded once.

The bits are those of bitsandbytes' NF4 and FP4, whose minus zero is zero here. The C++ kernel
computes on CPU tensors, Triton's where LORAFAST_BACKEND asks for it, and torch's operations
elsewhere: on a GPU bitsandbytes' own kernel is the one to call.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

from lorafast.engine.backends import cpu
from lorafast.engine.row_blocks import CPU_ELEMENTS, ELEMENTS
from lorafast.runtime import env

# The work of one number, in the multiply-adds that cpu.threads counts.
_WORK = 4


def dequantise_4bit(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    blocksize: int,
    first: int,
    out: torch.Tensor,
) -> torch.Tensor:
    """Write the numbers first, first + 1, ... of a weight into out, as many as it holds.

    Args:
        packed: uint8, dense; two numbers in a byte, the high half first.
        absmax: fp32 [blocks], dense.
        code: fp32 [16], dense.
        blocksize: the numbers of a block, an even number.
        first: the first number, counted along the flattened weight.
        out: fp32, bf16 or fp16, dense, of any shape.

    Returns:
        out.

    Raises:
        ValueError: a tensor is of another dtype, or too small for these numbers.
    """
    count = out.numel()
    _check(packed, absmax, code, blocksize, first, out)
    if not count:
        return out
    library = _library_for(out)
    if library is not None:
        library.dequantise_4bit(
            cpu.TYPES[out.dtype], packed.data_ptr(), absmax.data_ptr(), code.data_ptr(), blocksize,
            first, count, out.data_ptr(), cpu.threads(_WORK * count),
        )  # fmt: skip
        return out
    kernel = _load() if _kernel_serves(out) else None
    (kernel or _by_torch)(packed.view(-1), absmax, code, blocksize, first, out.view(-1))
    return out


def scale_blocks(values: torch.Tensor, absmax: torch.Tensor, blocksize: int) -> None:
    """Multiply each block of the flat values by its absmax, in place; the last may be shorter."""
    blocks = values.numel() // blocksize
    values[: blocks * blocksize].view(blocks, blocksize).mul_(absmax[:blocks, None])
    if rest := values.numel() - blocks * blocksize:
        values[-rest:].mul_(absmax[blocks])


def _check(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    blocksize: int,
    first: int,
    out: torch.Tensor,
) -> None:
    """Raise ValueError unless a kernel may read and write these tensors by their addresses."""
    given = {"packed": packed, "absmax": absmax, "code": code, "out": out}
    dtypes = (torch.uint8,), (torch.float32,), (torch.float32,), tuple(cpu.TYPES)
    for (name, tensor), allowed in zip(given.items(), dtypes, strict=True):
        if tensor.dtype not in allowed or not tensor.is_contiguous():
            words = " or ".join(map(str, allowed))
            raise ValueError(f"{name} must be dense {words}; it is {tensor.dtype}")
        if tensor.device != out.device:
            raise ValueError(f"{name} is on {tensor.device}, and out on {out.device}")
    if blocksize < 2 or blocksize % 2 or first < 0:
        raise ValueError(f"blocksize={blocksize} must be even, and first={first} not negative")
    stop = first + out.numel()
    blocks, held = -(-stop // blocksize), (2 * packed.numel(), absmax.numel(), code.numel())
    if held[0] < stop or held[1] < blocks or held[2] < 16:
        raise ValueError(
            f"packed holds {held[0]} numbers, absmax {held[1]} blocks and code {held[2]} numbers; "
            f"up to number {stop} of blocks of {blocksize} it takes {stop}, {blocks} and 16"
        )


def _library_for(out: torch.Tensor) -> Any:
    """The module of C++ kernels, if it is there and may serve; else None."""
    # A fake tensor has no memory to write to.
    plain = out.device.type == "cpu" and type(out) in (torch.Tensor, torch.nn.Parameter)
    if not plain or env.backend() not in ("auto", "cpu") or isinstance(cpu.library(), str):
        return None
    return cpu.library()


def _kernel_serves(out: torch.Tensor) -> bool:
    """True if Triton's kernel is asked for: no trial admits it."""
    if out.device.type == "cpu":
        # Triton's interpreter computes bf16 wrongly.
        return env.interprets() and out.dtype is not torch.bfloat16
    return out.device.type in ("cuda", "xpu") and env.backend() == "triton"


@functools.cache
def _load() -> Callable | None:
    # Without Triton, or with a broken one, torch's operations serve.
    try:
        return importlib.import_module("lorafast.engine.kernels.dequantise").dequantise_4bit
    except Exception:
        return None


def _by_torch(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    blocksize: int,
    first: int,
    out: torch.Tensor,
) -> None:
    """Write the numbers into out [count] by operations of torch, some blocks at a time."""
    # The two numbers of every byte.
    pairs = torch.stack((code.repeat_interleave(16), code.repeat(16)), 1)
    elements = CPU_ELEMENTS if out.device.type == "cpu" else ELEMENTS
    step, stop = max(1, elements // blocksize), first + out.numel()
    for block in range(first // blocksize, -(-stop // blocksize), step):
        begin, end = block * blocksize, min((block + step) * blocksize, stop)
        index = packed[begin // 2 : (end + 1) // 2].int()
        numbers = pairs.index_select(0, index).view(-1)
        scale_blocks(numbers, absmax[block:], blocksize)
        inside = slice(max(first, begin), end)
        out[inside.start - first : inside.stop - first] = numbers[
            inside.start - begin : inside.stop - begin
        ]
