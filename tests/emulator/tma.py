"""Tensor maps, as Triton's launcher asks the CUDA driver for them, and the boxes that TMA moves."""

from __future__ import annotations

import numpy as np

from emulator.memory import Fault
from emulator.tensor_cores import swizzled

# CU_TENSOR_MAP_SWIZZLE_32B, 64B and 128B are 1, 2 and 3; wgmma's descriptors count down.
_MODES = {0: 0, 1: 3, 2: 2, 3: 1}
_SPANS = {1: 32, 2: 64, 3: 128}


def refusals(
    base: int, swizzle: int, itemsize: int, box: list[int], shape: list[int], strides: list[int]
) -> list[str]:
    """Return every reason why cuTensorMapEncodeTiled would refuse a tensor map.

    shape, strides (in elements) and box: outermost first. Rows that overlap are legal for CUDA, but
    not what a kernel of ours means.
    """
    apart, inner = [stride * itemsize for stride in strides], box[-1] * itemsize
    rules = {
        f"address {base:#x} is no multiple of 16": base % 16,
        f"strides {strides} of {itemsize} bytes": any(
            size % 16 or not 0 < size < 1 << 40 for size in apart[:-1]
        ),
        f"shape {shape}": any(not 0 < size <= 1 << 32 for size in shape),
        f"box {box}": any(not 0 < size <= 256 for size in box),
        f"box rows of {inner} bytes": inner % 16,
        f"box rows of {inner} bytes in swizzle {swizzle}": swizzle and inner > _SPANS[swizzle],
        f"last stride {strides[-1]}": strides[-1] != 1,
        f"overlapping strides {strides} of shape {shape}": any(
            outer < inner * size
            for outer, inner, size in zip(apart, apart[1:], shape[1:], strict=False)
        ),
    }
    return [reason for reason, broken in rules.items() if broken]


class TensorMap:
    """What cuTensorMapEncodeTiled makes of a matrix. Raises a Fault where it would refuse."""

    def __init__(
        self,
        base: int,
        swizzle: int,
        itemsize: int,
        box: list[int],
        shape: list[int],
        strides: list[int],
    ):
        if reasons := refusals(base, swizzle, itemsize, box, shape, strides):
            raise Fault(f"cuTensorMapEncodeTiled refuses: {'; '.join(reasons)}")
        self.base, self.mode, self.itemsize = base, _MODES[swizzle], itemsize
        self.box, self.shape = list(box), list(shape)
        self.strides = [stride * itemsize for stride in strides]

    @property
    def span(self) -> tuple[int, int]:
        """The addresses that it can touch: the first, and the last one + 1."""
        last = sum((n - 1) * apart for n, apart in zip(self.shape, self.strides, strict=True))
        return self.base, self.base + last + self.itemsize

    @property
    def bytes(self) -> int:
        """The bytes of a box, those beyond the tensor's ends included."""
        return int(np.prod(self.box)) * self.itemsize

    def place(self, first: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Return the addresses of a box's elements, and which of them are inside the tensor.

        first: the indices of the box's first element, outermost first.
        """
        at = np.indices(self.box).reshape(len(self.box), -1) + np.array(first)[:, None]
        inside = ((at >= 0) & (at < np.array(self.shape)[:, None])).all(axis=0)
        return self.base + (at * np.array(self.strides)[:, None]).sum(axis=0), inside

    def shared(self, start: int) -> np.ndarray:
        """Return the shared addresses of the elements in the same order: dense rows, swizzled."""
        if start % 128:
            raise Fault(f"TMA box at shared address {start:#x}, which is no multiple of 128")
        return swizzled(start + np.arange(int(np.prod(self.box))) * self.itemsize, self.mode)
