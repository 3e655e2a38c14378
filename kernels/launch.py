"""What every launch asks of its tensors: where to run, how precisely, how they lie, and descriptors of them."""

from __future__ import annotations

import contextlib
import functools

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from lorafast.engine import philox
from lorafast.engine.kernels import configs
from lorafast.runtime import devices


def on(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Kernels launch on the current device, which need not be x's."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def arch_of(x: torch.Tensor) -> str:
    """sm_90 and its like; cpu under Triton's interpreter."""
    return devices.of(x.device).name


def precision(x: torch.Tensor) -> str:
    """tf32 only where torch's own matrix products use it."""
    # allow_tf32, the older name of the same setting, raises once anybody has used the newer one.
    return (
        "tf32"
        if x.dtype == torch.float32
        and x.is_cuda
        and torch.backends.cuda.matmul.fp32_precision == "tf32"
        else "ieee"
    )


def seed_of(seed: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """The seed's pointer, or any other where nothing is dropped and none is read."""
    return x if seed is None else seed


def groups(K: int) -> int:
    """How many Philox calls a row of K elements takes."""
    return configs.ceil_div(K, philox.GROUP)


def dense(t: torch.Tensor, dim: int) -> bool:
    """Whether neighbours along dim lie side by side."""
    return t.stride(dim) == 1 or t.shape[dim] == 1


def aligned(t: torch.Tensor) -> bool:
    """Whether a TMA descriptor can hold it: one dim dense, the rows 16 bytes apart or a multiple, none of them empty or shared."""
    dim = 1 if dense(t, 1) else 0
    apart = t.stride(1 - dim)
    return (
        dense(t, dim)
        and t.numel() > 0
        and apart >= t.shape[dim]
        and apart * t.itemsize % 16 == 0
        and t.data_ptr() % 16 == 0
    )


def descriptor(t: torch.Tensor, block: tuple[int, int]) -> TensorDescriptor:
    """A TMA descriptor of t's rows. Remembered by address and shape: a weight's is the same in every call."""
    if not t.is_cuda:
        return TensorDescriptor(t, list(t.shape), [t.stride(0), 1], list(block))
    return _remembered(t.data_ptr(), t.dtype, tuple(t.shape), t.stride(0), block)


class Address:
    """Stands for a tensor in a remembered descriptor, which must not keep its memory alive."""

    __slots__ = ("dtype", "pointer")

    def __init__(self, pointer: int, dtype: torch.dtype):
        self.pointer, self.dtype = pointer, dtype

    def data_ptr(self) -> int:
        """Where the tensor's first element lies."""
        return self.pointer


@functools.lru_cache(maxsize=8192)
def _remembered(
    pointer: int, dtype: torch.dtype, shape: tuple[int, int], apart: int, block: tuple[int, int]
) -> TensorDescriptor:
    # Made anew a descriptor costs three times as much Python as looking it up, and a call has six.
    return TensorDescriptor(Address(pointer, dtype), list(shape), [apart, 1], list(block))
