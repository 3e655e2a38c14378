"""How fast this machine moves memory: what a plain copy reaches, in the run whose figures it stands beside."""

from __future__ import annotations

import functools

import torch

from lorafast.bench import memory
from lorafast.bench.clock import Clock, Mark

# Two such buffers are more than the last cache of most machines holds.
BEYOND_CACHE = 128 << 20
_COPIES = 5


def measured(device: torch.device, size: int) -> float | None:
    """Bytes a second, read and written, of a copy beyond the caches or of `size` bytes, which a cache may hold: the faster one,
    since a floor is what nobody gets under. None where there is no room.
    """
    found = [_rate(device, one, torch.get_num_threads()) for one in (size, BEYOND_CACHE)]
    return max((rate for rate in found if rate), default=None)


@functools.cache
def _rate(device: torch.device, size: int, threads: int) -> float | None:
    """Of the fastest of a few copies; measured once a process."""
    try:
        source = torch.ones(size, dtype=torch.uint8, device=device)
        target = torch.zeros_like(source)
        clock = Clock(device)

        def copy(mark: Mark) -> None:
            mark()
            target.copy_(source)
            mark()

        ms = min(sum(clock.time(copy)) for _ in range(_COPIES))
    except Exception as error:
        if not memory.is_out_of_memory(error):
            raise
        return None
    return 2 * size / (ms / 1e3) if ms else None
