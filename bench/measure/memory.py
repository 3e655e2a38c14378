"""Bytes a function allocates."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch

from lorafast.engine import weight_buffers
from lorafast.testing import Allocated, allocated


def measure(function: Callable[[], object], device: torch.device) -> Allocated:
    """Return the bytes that `function` allocates on the device: held at its end, and the peak.

    On a GPU they come from the allocator's statistics, on the CPU from its events.
    """
    # A buffer that is there already would count for nothing.
    weight_buffers.release()
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
