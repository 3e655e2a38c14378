"""What a launch needs from its tensors: device, precision, strides and TMA descriptors."""

from __future__ import annotations

import contextlib
import functools

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from lorafast.engine import philox
from lorafast.engine.kernels import configs
from lorafast.runtime import devices


def on(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Return a context in which x's device is the current one, on which Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def arch_of(x: torch.Tensor) -> devices.Arch:
    """Return the architecture of x's device; that of the CPU for Triton's interpreter."""
    return devices.of(x.device)


def precision(x: torch.Tensor) -> str:
    """Return the input precision of tl.dot: "tf32" only if torch's own products use it."""
    # allow_tf32, the older name of this setting, raises once the newer name has been used.
    return (
        "tf32"
        if x.dtype == torch.float32
        and x.is_cuda
        and torch.backends.cuda.matmul.fp32_precision == "tf32"
        else "ieee"
    )


def tf32_if_any(x: torch.Tensor) -> str:
    """Return "tf32" where x's device multiplies in it, else "ieee". Of AMD's GPUs one does."""
    arch = arch_of(x)
    return "ieee" if arch.vendor == "amd" and arch.name != "gfx942" else "tf32"


def seed_of(seed: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """Return the seed; x as a placeholder, which is not read, if there is no dropout."""
    return x if seed is None else seed


def groups(K: int) -> int:
    """Return the number of Philox calls for a row of K elements."""
    return configs.ceil_div(K, philox.GROUP)


def dense(t: torch.Tensor, dim: int) -> bool:
    """True if neighbours along dim are adjacent in memory."""
    return t.stride(dim) == 1 or t.shape[dim] == 1


def aligned(t: torch.Tensor) -> bool:
    """True if a TMA descriptor can describe the matrix.

    One dim is dense, the other has a stride of a multiple of 16 bytes, and rows neither overlap nor
    are empty.
    """
    dim = 1 if dense(t, 1) else 0
    stride = t.stride(1 - dim)
    return (
        dense(t, dim)
        and t.numel() > 0
        and stride >= t.shape[dim]
        and stride * t.itemsize % 16 == 0
        and t.data_ptr() % 16 == 0
    )


def descriptor(t: torch.Tensor, block: tuple[int, int]) -> TensorDescriptor:
    """Return a TMA descriptor of t, dense along its rows, for loads and stores of one block.

    On a GPU it is cached by address, shape and block: that of a weight is the same in every call.
    """
    if not t.is_cuda:
        return TensorDescriptor(t, list(t.shape), [t.stride(0), 1], list(block))
    return _cached_descriptor(t.data_ptr(), t.dtype, tuple(t.shape), t.stride(0), block)


class Address:
    """A tensor's stand-in in a cached descriptor; it does not keep the tensor's memory alive."""

    __slots__ = ("dtype", "pointer")

    def __init__(self, pointer: int, dtype: torch.dtype):
        self.pointer, self.dtype = pointer, dtype

    def data_ptr(self) -> int:
        """Return the address of the tensor's first element."""
        return self.pointer


@functools.lru_cache(maxsize=8192)
def _cached_descriptor(
    pointer: int, dtype: torch.dtype, shape: tuple[int, int], stride: int, block: tuple[int, int]
) -> TensorDescriptor:
    # Making a descriptor takes longer than looking it up, and a call needs up to six of them.
    return TensorDescriptor(Address(pointer, dtype), list(shape), [stride, 1], list(block))
