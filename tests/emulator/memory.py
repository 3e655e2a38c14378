"""Global memory, which is the host's own, and shared memory with what is needed to see races.

Shared memory is divided into cells as small as the kernel's smallest access. A cell knows which
warp wrote it and which read it last since the last barrier, if an asynchronous copy is on its way
into it, if one still reads it, and if a store to it has not been made visible to the asynchronous
proxy by a fence.
"""

from __future__ import annotations

import bisect
import ctypes

import numpy as np

# The address of the first byte of shared memory, as on sm_90; a multiple of what swizzles need.
BASE = 1024
# In a stamp, in place of a warp's number: several warps.
MANY = 1023
UNITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Fault(Exception):
    """What a kernel did wrong: an access out of bounds or misaligned, a race, a missing wait."""


class Global:
    """The tensors of one launch as one array over the host's addresses.

    spans: (first byte, last byte + 1) of each; nothing outside them is touched.
    """

    def __init__(self, spans: list[tuple[int, int]]):
        merged: list[list[int]] = []
        for low, high in sorted(span for span in spans if span[1] > span[0]):
            if merged and low <= merged[-1][1]:
                merged[-1][1] = max(high, merged[-1][1])
            else:
                merged.append([low, high])
        self.spans = merged or [[64, 64]]
        self.starts, self.ends = (
            np.array([span[i] for span in self.spans], np.uint64) for i in (0, 1)
        )
        self.low = int(self.starts[0]) & ~63
        size = (int(self.ends[-1]) | 63) + 1 - self.low
        whole = np.frombuffer((ctypes.c_uint8 * size).from_address(self.low), np.uint8)
        self.views = {size: whole.view(unit) for size, unit in UNITS.items()}

    def check(self, address: np.ndarray, size: int, alignment: int, what: str) -> None:
        """Raise a Fault unless every [address, address + size) is aligned and within one span."""
        if not len(address):
            return
        off = address & np.uint64(alignment - 1)
        if off.any():
            first = int(address[off != 0][0])
            raise Fault(
                f"misaligned global access: {what} at {first:#x}, which needs {alignment} bytes"
            )
        at = np.searchsorted(self.starts, address, side="right") - 1
        bad = (at < 0) | (address + np.asarray(size, np.uint64) > self.ends[at])
        if bad.any():
            first = int(address[bad][0])
            near = self.spans[max(0, bisect.bisect(self.starts.tolist(), first) - 1)]
            raise Fault(
                f"global access out of bounds: {what}, {int(bad.sum())} lanes, the first at "
                f"{first:#x}, {first - near[1]:+d} bytes from the end of the tensor at {near[0]:#x}"
            )

    def load(self, address: np.ndarray, unit: int, count: int, what: str) -> np.ndarray:
        """Return [lanes, count] units of `unit` bytes."""
        self.check(address, unit * count, unit * count, what)
        return self.views[unit][self._index(address, unit)[:, None] + np.arange(count)]

    def store(self, address: np.ndarray, values: np.ndarray, what: str) -> None:
        """Write values [lanes, count]."""
        unit, count = values.itemsize, values.shape[1]
        self.check(address, unit * count, unit * count, what)
        self.views[unit][self._index(address, unit)[:, None] + np.arange(count)] = values

    def _index(self, address: np.ndarray, unit: int) -> np.ndarray:
        return ((address - np.uint64(self.low)) // np.uint64(unit)).astype(np.int64)


class Shared:
    """Shared memory of several CTAs, one behind the other.

    A flat address is that of PTX less BASE, plus cta·size. A stamp is epoch·1024 + warp; the epoch
    counts the barriers of a CTA.
    """

    def __init__(self, ctas: int, size: int, cell: int):
        self.size, self.cell = max(1024, -(-size // 1024) * 1024), cell
        self.limit = size
        data = np.full(ctas * self.size, 0xFF, np.uint8)
        self.views = {unit: data.view(kind) for unit, kind in UNITS.items()}
        cells = len(data) // cell
        self.wrote, self.read = np.zeros(cells, np.int32), np.zeros(cells, np.int32)
        self.written, self.pending = np.zeros(cells, bool), np.zeros(cells, np.int16)
        self.busy, self.dirty = np.zeros(cells, np.int16), np.zeros(cells, np.int16)
        self.epoch = np.ones(ctas, np.int32)

    def flat(self, address: np.ndarray, cta: np.ndarray, size: int, what: str) -> np.ndarray:
        """Return flat addresses of accesses of `size` bytes, which must be the CTA's own."""
        offset = address.astype(np.int64) - BASE
        if (bad := (offset < 0) | (offset + size > self.limit)).any():
            raise Fault(
                f"shared access out of bounds: {what}, offset {offset[bad][0]} of {self.limit}"
            )
        if (offset & (size - 1)).any():
            raise Fault(f"misaligned shared access: {what}, which needs {size} bytes")
        return offset + cta * self.size

    def cells(self, flat: np.ndarray, size: int) -> np.ndarray:
        """Return the cells [lanes, ·] of accesses of `size` bytes."""
        return (flat // self.cell)[:, None] + np.arange(max(1, size // self.cell))

    def reads(
        self, cells: np.ndarray, stamp: np.ndarray, what: str, asynchronous: bool = False
    ) -> None:
        """Note a read by `stamp` [lanes]. asynchronous: the asynchronous proxy reads."""
        stamp = np.broadcast_to(stamp[:, None], cells.shape)
        if self.pending[cells].any():
            raise Fault(f"shared read before an asynchronous copy was waited for: {what}")
        if not self.written[cells].all():
            raise Fault(f"shared read of what nobody wrote: {what}")
        if asynchronous and self.dirty[cells].any():
            raise Fault(f"asynchronous read of stores without fence.proxy.async: {what}")
        if _by_another_warp(self.wrote[cells], stamp).any():
            raise Fault(
                f"race: shared read of what another warp wrote since the last barrier: {what}"
            )
        new = np.where(_by_another_warp(self.read[cells], stamp), stamp | MANY, stamp)
        self.read[cells] = new
        other = self.read[cells] != new
        if other.any():
            self.read[cells[other]] = new[other] | MANY

    def writes(
        self,
        cells: np.ndarray,
        stamp: np.ndarray,
        what: str,
        unchanged: np.ndarray | bool = False,
        agreed: np.ndarray | bool = False,
    ) -> None:
        """Note a write by `stamp` [lanes].

        unchanged [lanes]: memory held the values already. agreed [lanes]: all threads of this
        instruction wrote the same.
        """
        stamp = np.broadcast_to(stamp[:, None], cells.shape)
        if self.pending[cells].any():
            raise Fault(f"shared write where an asynchronous copy is on its way: {what}")
        if self.busy[cells].any():
            raise Fault(f"shared write of what an asynchronous operation still reads: {what}")
        if _by_another_warp(self.read[cells], stamp).any():
            raise Fault(
                f"race: shared write of what another warp read since the last barrier: {what}"
            )
        before = _by_another_warp(self.wrote[cells], stamp).any(axis=1) & ~np.asarray(unchanged)
        self.wrote[cells] = stamp
        within = (self.wrote[cells] != stamp).any(axis=1) & ~np.asarray(agreed)
        if before.any() or within.any():
            raise Fault(
                f"race: two warps write the same shared address since the last barrier: {what}"
            )
        self.written[cells] = True

    def depart(self, cells: np.ndarray) -> None:
        """Note that an asynchronous copy into the cells is on its way."""
        self.pending[cells] += 1

    def land(self, cells: np.ndarray, stamp: np.ndarray | int) -> None:
        """Note that a copy has been waited for, by `stamp` (0: by everybody)."""
        self.pending[cells] -= 1
        self.wrote[cells] = stamp
        self.written[cells] = True


def _by_another_warp(old: np.ndarray, stamp: np.ndarray) -> np.ndarray:
    """True where an old stamp is of the same epoch as the new one and of another warp."""
    apart = old ^ stamp
    return (apart != 0) & (apart < 1024)
