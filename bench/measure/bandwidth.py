"""Memory bandwidth of a plain copy, measured in the same process as the figures next to it."""

from __future__ import annotations

import functools

import torch

from lorafast.bench.measure.timing import Mark, Timer
from lorafast.runtime import devices

# Two buffers of this size exceed the last-level cache of most machines.
BEYOND_CACHE = 128 << 20
_COPIES = 5


def copy_bandwidth(device: torch.device, size: int) -> float | None:
    """Return bytes per second, read and written, of the faster of two copies.

    One copies BEYOND_CACHE bytes and the other `size` bytes, which may fit a cache: a lower bound
    needs the fastest memory there is. None if there is no memory for the buffers.
    """
    found = [_copy_rate(device, n, torch.get_num_threads()) for n in (size, BEYOND_CACHE)]
    return max((rate for rate in found if rate), default=None)


@functools.cache
def _copy_rate(device: torch.device, size: int, threads: int) -> float | None:
    """Return the rate of the fastest of a few copies, measured once per process."""
    try:
        source = torch.ones(size, dtype=torch.uint8, device=device)
        target = torch.zeros_like(source)
        timer = Timer(device)

        def copy(mark: Mark) -> None:
            mark()
            target.copy_(source)
            mark()

        ms = min(sum(timer.time(copy)) for _ in range(_COPIES))
    except Exception as error:
        if not devices.is_out_of_memory(error):
            raise
        return None
    return 2 * size / (ms / 1e3) if ms else None
