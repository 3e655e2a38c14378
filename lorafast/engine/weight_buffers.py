"""Weights that are made when they are needed, each in a buffer that is used again for the next one.

A quantised weight is a matrix [N,K] for the time of one product. Buffers are kept, one for each
device and dtype where calls do not overlap, and no autograd graph holds one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch

from lorafast.runtime import torch_internals

# Buffers that nobody uses now, by device, stream and dtype.
_free: dict[tuple[torch.device, int, torch.dtype], list[torch.Tensor]] = {}


class WeightSource(Protocol):
    """A weight [N,K] that can be made when it is needed, such as a quantised one."""

    @property
    def shape(self) -> tuple[int, int]:
        """N and K."""

    @property
    def device(self) -> torch.device:
        """Where the weight is."""

    @property
    def packed(self) -> torch.Tensor:
        """The tensor that the weight is made of."""

    def whole(self, out: torch.Tensor) -> torch.Tensor:
        """Write W into out [N,K], which is dense, and return it."""


class Borrowed(NamedTuple):
    """A weight [N,K] for one product; buffer, free: what give_back needs, None for a fresh one."""

    weight: torch.Tensor
    buffer: torch.Tensor | None = None
    free: list[torch.Tensor] | None = None


def take(source: WeightSource, dtype: torch.dtype) -> Borrowed:
    """Make the weight in the dtype, in a buffer that the next borrower overwrites.

    On a GPU the next one on the same stream, after the kernels of this one. Under the capture of a
    CUDA graph the memory is the graph's own, and where tensors may be no real ones it is fresh.
    """
    (N, K), device = source.shape, source.device
    if _needs_fresh(device):
        return Borrowed(_filled(source, _empty(N * K, dtype, device).view(N, K)))
    free = _free.setdefault((device, _stream(device), dtype), [])
    try:
        buffer: torch.Tensor | None = free.pop()
    except IndexError:
        buffer = None
    if buffer is None or buffer.numel() < N * K:
        # The smaller one is freed before the larger one is made.
        buffer = None
        buffer = _empty(N * K, dtype, device)
    try:
        return Borrowed(_filled(source, buffer[: N * K].view(N, K)), buffer, free)
    except BaseException:
        free.append(buffer)
        raise


def give_back(borrowed: Borrowed) -> None:
    """Let the next borrower have the buffer."""
    _, buffer, free = borrowed
    if free is not None:
        free.append(buffer)


@contextlib.contextmanager
def borrow(source: WeightSource, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Yield what take makes, and give it back."""
    borrowed = take(source, dtype)
    try:
        yield borrowed.weight
    finally:
        give_back(borrowed)


class Loan:
    """The weight of one call, which its backward takes again; the autograd node keeps this instead.

    Args:
        source: what gives the weight.
        dtype: the dtype of the call.
    """

    def __init__(self, source: WeightSource, dtype: torch.dtype) -> None:
        self.source, self.dtype = source, dtype
        self._packed = source.packed
        self._version = torch_internals.version_of(self._packed)

    def take(self) -> Borrowed:
        """Make the weight again. RuntimeError if the numbers that it is made of have changed."""
        packed, before = self.source.packed, self._packed
        # A module that moves to another device has its numbers in another tensor.
        moved = packed.device != before.device and packed.shape == before.shape
        same = packed is before and torch_internals.version_of(packed) == self._version
        if not (same or moved):
            raise RuntimeError(
                "the quantised weight of this call has been modified in place or replaced since "
                "its forward, and backward would dequantise another weight"
            )
        return take(self.source, self.dtype)


def release() -> None:
    """Free the buffers that nobody uses."""
    _free.clear()


def _needs_fresh(device: torch.device) -> bool:
    """True under a mode, a transform or a tracer, whose tensors no later call may meet."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return True
    return is_observed()


def is_observed() -> bool:
    """Return True if a mode, a transform or a tracer sees the operations of a call now."""
    return (
        # First, because the compiler cannot trace the others.
        torch.compiler.is_compiling()
        or torch_internals.dispatch_modes_active()
        or torch_internals.transforms_active()
        or torch.jit.is_tracing()
    )


def _stream(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.current_stream(device).cuda_stream
    return torch.xpu.current_stream(device).stream_id if device.type == "xpu" else 0


def _empty(elements: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    # One made in inference mode could not be written outside of it.
    with torch.inference_mode(False):
        return torch.empty(elements, dtype=dtype, device=device)


def _filled(source: WeightSource, out: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return source.whole(out)
