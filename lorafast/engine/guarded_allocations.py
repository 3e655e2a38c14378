"""Poisoned memory around and inside what a kernel writes, to see what it should not write."""

from __future__ import annotations

from typing import Any

import torch

from lorafast.runtime.torch_internals import DispatchMode


class GuardedAllocations(DispatchMode):
    """Tensors that are made inside have NaN around them, which must still be there afterwards.

    They hold NaN until they are written.
    """

    ROOM = 2048
    MADE = (
        "empty.memory_format",
        "new_empty.default",
        "new_empty_strided.default",
        "empty_like.default",
        "zeros.default",
        "addmm.default",
        "mm.default",
    )

    def __init__(self) -> None:
        super().__init__()
        self.buffers: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the operation, and put what it made into the middle of a wider buffer."""
        out = func(*args, **(kwargs or {}))
        if func.__name__ not in self.MADE or not out.is_floating_point():
            return out
        buffer = out.new_full((out.numel() + 2 * self.ROOM,), torch.nan)
        self.buffers.append(buffer)
        inside = buffer.as_strided(out.shape, out.stride(), self.ROOM)
        return inside if func.__name__.startswith(("empty", "new_empty")) else inside.copy_(out)

    @property
    def whole(self) -> bool:
        """True if something was made, and nothing was written beside it."""
        return bool(self.buffers) and all(
            bool(part.isnan().all())
            for one in self.buffers
            for part in (one[: self.ROOM], one[-self.ROOM :])
        )
