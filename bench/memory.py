"""Bytes of a step: what is alive at the end of forward, the most at once, and what it looks like when there are none left."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch

from lorafast.testing import Allocated, allocated


def measured(function: Callable[[], object], device: torch.device) -> Allocated:
    """Bytes function allocates on the device: by the allocator's own statistics on a GPU, event by event on the CPU."""
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


# By torch's allocator on the CPU, by CUDA, and by cuBLAS, which asks CUDA for its workspace itself.
_NO_ROOM = ("DefaultCPUAllocator", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that a device or the machine has no memory left."""
    said = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in said for words in _NO_ROOM)
    )
