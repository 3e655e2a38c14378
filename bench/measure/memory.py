"""Bytes a function allocates, and the errors that mean that memory ran out."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch

from lorafast.testing import Allocated, allocated

# Parts of the messages of torch's CPU allocator, of CUDA, and of cuBLAS, which allocates its
# workspace itself.
_OUT_OF_MEMORY = ("DefaultCPUAllocator", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def measure(function: Callable[[], object], device: torch.device) -> Allocated:
    """Return the bytes that `function` allocates on the device: held at its end, and the peak.

    On a GPU they come from the allocator's statistics, on the CPU from its events.
    """
    if device.type != "cuda":
        return allocated(function)
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    kept = function()
    torch.cuda.synchronize(device)
    found = Allocated(
        torch.cuda.memory_allocated(device) - before,
        torch.cuda.max_memory_allocated(device) - before,
    )
    del kept
    return found


def is_out_of_memory(error: BaseException) -> bool:
    """True if the exception means that a device or the machine has no memory left."""
    message = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(part in message for part in _OUT_OF_MEMORY)
    )
