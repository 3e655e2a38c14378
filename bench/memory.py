"""Bytes of a step: what is alive at the end of forward, and the most at once."""

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
    found = Allocated(torch.cuda.memory_allocated(device) - before, torch.cuda.max_memory_allocated(device) - before)
    del kept
    return found
