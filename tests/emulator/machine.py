"""The machine: CTAs of one launch side by side, every thread with its own program counter.

Of the threads that can run, those at the first block in the program's order go next, all together;
warps that diverged so meet again. A thread waits at bar.sync until all of its CTA have arrived.
Asynchronous copies land as late as they may: cp.async when its thread waits for the group, TMA when
no thread can run without it. A kernel that forgets to wait reads what is still on its way, and
faults.
"""

from __future__ import annotations

import numpy as np

from emulator import parser, tensor_cores
from emulator.async_units import AsyncUnits
from emulator.memory import Fault, Global, Shared
from emulator.tma import TensorMap
from emulator.translation import Translator

# The threads that run side by side.
WAVE = 2048
# The addresses that stand for tensor maps.
MAPS = 0x7E << 56
_KINDS = {"p": bool, "b16": np.uint16, "b32": np.uint32, "b64": np.uint64}


class Code:
    """A kernel's PTX, ready to run."""

    def __init__(self, text: str):
        self.text, self.program = text, parser.parse(text)
        translator = Translator(self.program)
        self.functions = translator.functions()
        self.texts, self.cell = translator.texts, translator.cell
        self.kinds = list(self.program.registers.values())


class Machine(AsyncUnits):
    """Some CTAs of a grid. params: bits as int, or a TensorMap."""

    def __init__(
        self,
        code: Code,
        grid: tuple[int, int, int],
        ctas: range,
        params: list[int | TensorMap],
        shared: int,
        memory: Global,
    ):
        self.code, self.memory, self.params = code, memory, params
        self.per, count = code.program.threads, len(ctas)
        self.T = self.per * count
        thread = np.arange(self.T, dtype=np.uint32)
        one, zero = np.ones(self.T, np.uint32), np.zeros(self.T, np.uint32)
        self.cta = (thread // self.per).astype(np.int64)
        self.tid, self.ntid = (thread % self.per, zero, zero), (one * self.per, one, one)
        number = np.array(ctas, np.uint32)[self.cta]
        x, y, z = number % grid[0], number // grid[0] % grid[1], number // (grid[0] * grid[1])
        self.ctaid = tuple(axis.astype(np.uint32) for axis in (x, y, z))
        self.nctaid = tuple(one * np.uint32(size) for size in grid)
        self.laneid, self.warpid = thread % 32, self.tid[0] // 32
        self.all, self.none = np.ones(self.T, bool), np.zeros(self.T, bool)
        self.shared = Shared(count, shared, code.cell)
        # The barrier that a thread waits at, -1 for none; and whether it waits at an mbarrier.
        self.waits, self.sleeps = np.full(self.T, -1), np.zeros(self.T, bool)
        self.reset_units()

    def run(self) -> None:
        """Run until every thread has returned."""
        zeros = {kind: np.zeros(self.T, number) for kind, number in _KINDS.items()}
        R = [zeros[kind] for kind in self.code.kinds]
        at, functions = np.zeros(self.T, np.int64), self.code.functions
        block, mask = 0, None
        with np.errstate(all="ignore"):
            while True:
                after = functions[block](self, R, mask)
                quiet = not self.sleeps.any() and (self.waits < 0).all()
                if mask is None and isinstance(after, int) and quiet:
                    if after < 0:
                        return
                    block = after
                    continue
                if mask is None:
                    at[:] = after
                else:
                    at[mask] = after if isinstance(after, int) else after[mask]
                alive = at >= 0
                if not alive.any():
                    return
                while not (able := alive & (self.waits < 0) & ~self.sleeps).any():
                    self._release(alive)
                block = int(at[able].min())
                mask = able & (at == block)
                mask = None if mask.all() else mask

    def _release(self, alive: np.ndarray) -> None:
        """Open barriers that all have reached, or let a copy land; no thread can run without."""
        moved = False
        for cta in np.unique(self.cta[alive & (self.waits >= 0)]):
            threads = slice(cta * self.per, (cta + 1) * self.per)
            waits = self.waits[threads]
            if (alive[threads] & (waits == waits[0])).all():
                self.waits[threads] = -1
                self.shared.epoch[cta] += 1
                moved = True
        if not moved and self.loads:
            self.land(self.loads.pop(0))
        elif not moved:
            raise Fault(
                f"deadlock: {int((self.waits >= 0).sum())} threads at a barrier, "
                f"{int(self.sleeps.sum())} at an mbarrier"
            )

    def branch(
        self, taken: np.ndarray, m: np.ndarray | None, jump: int, fall: int
    ) -> int | np.ndarray:
        """Return the next block of each thread; a number where it is the same for all."""
        active = taken if m is None else taken[m]
        if active.all():
            return jump
        return np.where(taken, jump, fall) if active.any() else fall

    def barrier(self, m: np.ndarray | None, number: int, count: int) -> None:
        """Let threads wait at a barrier of the CTA."""
        if count and count != self.per:
            raise NotImplementedError("barrier of a part of a CTA")
        self.waits[slice(None) if m is None else m] = number

    def together(self, m: np.ndarray | None, at: int) -> None:
        """Raise a Fault unless warps are whole, where an instruction needs all threads of one."""
        if m is not None:
            warps = m.reshape(-1, 32)
            if (warps.any(axis=1) != warps.all(axis=1)).any():
                raise Fault(f"a part of a warp at {self.code.texts[at]}")

    def full(self, value: np.ndarray | np.generic) -> np.ndarray:
        """Return a value as an array [threads]."""
        return np.full(self.T, value) if np.ndim(value) == 0 else value

    def param(self, i: int, offset: int, size: int) -> np.ndarray:
        """Return `size` bytes of a parameter."""
        value = self.params[i]
        if isinstance(value, TensorMap):
            raise Fault("a tensor map read as a number")
        return np.full(self.T, value >> 8 * offset & (1 << 8 * size) - 1, f"u{size}")

    def address(self, i: int) -> np.ndarray:
        """Return the address of a parameter that is a tensor map."""
        return np.full(self.T, MAPS + i, np.uint64)

    def map_at(self, value: int, what: str) -> TensorMap:
        """Return the tensor map behind an address."""
        number = value - MAPS
        if 0 <= number < len(self.params) and isinstance(self.params[number], TensorMap):
            return self.params[number]
        raise Fault(f"no tensor map: {what}")

    def shuffled(
        self, how: str, value: np.ndarray, by: np.ndarray, clamp: np.ndarray, m: np.ndarray | None
    ) -> np.ndarray:
        """Return what shfl reads of other lanes."""
        if (self.full(clamp)[self.lanes(m)] != 31).any():
            raise NotImplementedError("shfl among a part of a warp")
        lane = {"bfly": self.laneid ^ by, "idx": self.laneid * np.uint32(0) + by}[how]
        return value[(np.arange(self.T) & ~31) + (lane & np.uint32(31))]

    def warp_sum(self, value: np.ndarray, members: np.ndarray, m: np.ndarray | None) -> np.ndarray:
        """Return what redux.add adds: the sum of each warp's lanes, which all take part."""
        if (self.full(members)[self.lanes(m)] != 0xFFFFFFFF).any():
            raise NotImplementedError("redux among a part of a warp")
        return self.full(value).reshape(-1, 32).sum(1, dtype=np.uint32).repeat(32)

    def lanes(self, guard: np.ndarray | None) -> np.ndarray:
        """Return the numbers of the threads of a guard."""
        return np.arange(self.T) if guard is None else np.flatnonzero(guard)

    def stamp(self, lanes: np.ndarray) -> np.ndarray:
        """Return the stamps of threads."""
        return self.shared.epoch[self.cta[lanes]] * 1024 + self.warpid[lanes].astype(np.int32)

    def load_global(self, R, targets, address, guard, size, wide, signed, at) -> None:
        """Load registers from global memory."""
        lanes, what = self.lanes(guard), self.code.texts[at]
        values = self.memory.load(address[lanes], size, len(targets), what)
        self._loaded(R, targets, lanes, values, wide, signed)

    def load_shared(self, R, targets, address, guard, size, wide, signed, at) -> None:
        """Load registers from shared memory."""
        lanes, shared, what = self.lanes(guard), self.shared, self.code.texts[at]
        if not len(lanes):
            return
        flat = shared.flat(self.full(address)[lanes], self.cta[lanes], size * len(targets), what)
        shared.reads(shared.cells(flat, size * len(targets)), self.stamp(lanes), what)
        values = shared.views[size][(flat // size)[:, None] + np.arange(len(targets))]
        self._loaded(R, targets, lanes, values, wide, signed)

    def _loaded(self, R, targets, lanes, values, wide, signed) -> None:
        """Write values [lanes, targets] to registers of `wide` bytes."""
        for i, target in enumerate(targets):
            column = values[:, i]
            if signed:
                column = column.view(f"i{values.itemsize}").astype(f"i{wide}")
            elif values.itemsize != wide:
                column = column.astype(f"u{wide}")
            register = R[target].copy()
            register[lanes] = column.view(f"u{wide}")
            R[target] = register

    def store_global(self, address, values, guard, at) -> None:
        """Store values to global memory."""
        lanes = self.lanes(guard)
        if len(lanes):
            stacked = np.stack([value[lanes] for value in values], axis=1)
            self.memory.store(address[lanes], stacked, self.code.texts[at])

    def store_shared(self, address, values, guard, at) -> None:
        """Store values to shared memory."""
        lanes = self.lanes(guard)
        if len(lanes):
            stacked = np.stack([value[lanes] for value in values], axis=1)
            self._store(lanes, self.full(address)[lanes], stacked, self.code.texts[at])

    def _store(self, lanes, address, values, what) -> None:
        """Store values [lanes, units] to shared memory."""
        shared, unit, count = self.shared, values.itemsize, values.shape[1]
        flat = shared.flat(address, self.cta[lanes], unit * count, what)
        cells = shared.cells(flat, unit * count)
        places = (flat // unit)[:, None] + np.arange(count)
        unchanged = (shared.views[unit][places] == values).all(axis=1)
        shared.views[unit][places] = values
        # No other thread of this very instruction wrote something else.
        agreed = (shared.views[unit][places] == values).all(axis=1)
        shared.writes(cells, self.stamp(lanes), what, unchanged, agreed)
        shared.dirty[cells] = 1

    def ldmatrix(self, R, targets, address, m, trans, at) -> None:
        """Load 8×8 matrices of halves."""
        self.together(m, at)
        count, shared, what = len(targets), self.shared, self.code.texts[at]
        warps, lanes = self._rows_of_matrices(m, count)
        flat = shared.flat(self.full(address)[lanes], self.cta[lanes], 16, what)
        shared.reads(shared.cells(flat, 16), self.stamp(lanes), what)
        rows = shared.views[2][(flat // 2)[:, None] + np.arange(8)]
        rows = rows.reshape(len(warps), 8 * count, 8)
        values = np.stack(tensor_cores.from_rows(rows, count, trans), axis=1)
        threads = (warps[:, None] * 32 + np.arange(32)).ravel()
        self._loaded(R, targets, threads, values, 4, False)

    def stmatrix(self, R, address, sources, guard, trans, at) -> None:
        """Store 8×8 matrices of halves."""
        self.together(guard, at)
        count = len(sources)
        warps, lanes = self._rows_of_matrices(guard, count)
        rows = tensor_cores.to_rows([R[i] for i in sources], trans).reshape(-1, 8)
        which = (warps[:, None] * 8 * count + np.arange(8 * count)).ravel()
        values = np.ascontiguousarray(rows[which]).view(np.uint32)
        self._store(lanes, self.full(address)[lanes], values, self.code.texts[at])

    def _rows_of_matrices(self, m, count) -> tuple[np.ndarray, np.ndarray]:
        """Return the warps of a mask, and their threads that hold the address of a row."""
        warps = np.arange(self.T // 32) if m is None else np.flatnonzero(m.reshape(-1, 32)[:, 0])
        return warps, (warps[:, None] * 32 + np.arange(8 * count)).ravel()


def launch(
    code: Code,
    grid: tuple[int, int, int],
    params: list[int | TensorMap],
    shared: int,
    spans: list[tuple[int, int]],
) -> None:
    """Run every CTA of a grid, WAVE threads at a time."""
    maps = [param.span for param in params if isinstance(param, TensorMap)]
    memory, total = Global([*spans, *maps]), grid[0] * grid[1] * grid[2]
    step = max(1, WAVE // code.program.threads)
    for first in range(0, total, step):
        ctas = range(first, min(first + step, total))
        try:
            Machine(code, grid, ctas, params, shared, memory).run()
        except Fault as fault:
            where = f"{code.program.name} (CTAs {ctas.start} to {ctas.stop - 1})"
            raise Fault(f"{where}: {fault}") from None
