"""The units that work beside a machine's threads: cp.async, TMA, mbarriers and wgmma."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from emulator import tensor_cores
from emulator.memory import MANY, Fault
from emulator.tma import TensorMap


@dataclass
class Barrier:
    """An mbarrier: the arrivals it expects, those so far, bytes on their way, phases so far."""

    count: int
    arrived: int = 0
    left: int = 0
    phase: int = 0


@dataclass
class Load:
    """A TMA load on its way into shared memory."""

    tensor_map: TensorMap
    corner: list[int]
    flat: np.ndarray
    cells: np.ndarray
    cta: int
    barrier: int


@dataclass
class Accumulator:
    """A register of wgmma, by warpgroup: its values, the last product's group, if one is left."""

    values: np.ndarray
    group: np.ndarray
    under_way: np.ndarray


class AsyncUnits:
    """The part of a machine that works asynchronously."""

    def reset_units(self) -> None:
        """Start with nothing under way."""
        # cp.async: commits so far by thread; (threads, their groups, cells, flat addresses, data).
        self.commits: np.ndarray = np.zeros(self.T, np.int64)
        self.copies: list[tuple[np.ndarray, ...]] = []
        self.barriers: dict[tuple[int, int], Barrier] = {}
        self.loads: list[Load] = []
        # TMA stores: (thread, group, cells); groups committed so far by thread.
        self.stores: list[tuple[int, int, np.ndarray]] = []
        self.bulks = np.zeros(self.T, np.int64)
        # wgmma: (warpgroup, group, cells, CTA) that products read; groups so far by warpgroup.
        self.products: list[tuple[int, int, np.ndarray, int]] = []
        self.product_groups = np.zeros(max(1, self.T // 128), np.int64)
        self.accumulators: dict[int, Accumulator] = {}

    def copy(self, target, source, size, kept, guard, at) -> None:
        """Start cp.async of `size` bytes; kept: the bytes that are read, all or none."""
        lanes, shared, what = self.lanes(guard), self.shared, self.code.texts[at]
        if not len(lanes):
            return
        flat = shared.flat(self.full(target)[lanes], self.cta[lanes], size, what)
        cells, kept = shared.cells(flat, size), kept[lanes]
        read = kept == size
        if kept[~read].any():
            raise NotImplementedError(f"part of a copy: {what}")
        data = np.zeros((len(lanes), size // 4), np.uint32)
        wide = {4: 4, 8: 8, 16: 8}[size]
        words = self.memory.load(source[lanes[read]], wide, size // wide, what)
        data[read] = np.ascontiguousarray(words).view(np.uint32)
        shared.writes(cells, self.stamp(lanes), what)
        shared.depart(cells)
        self.copies.append((lanes, self.commits[lanes], cells, flat, data))

    def commit(self, guard) -> None:
        """Close a group of cp.async."""
        self.commits[slice(None) if guard is None else guard] += 1

    def wait(self, most: int, guard) -> None:
        """Wait until at most `most` groups of a thread's copies are on their way."""
        active, shared, left = self.all if guard is None else guard, self.shared, []
        for lanes, groups, cells, flat, data in self.copies:
            done = active[lanes] & (groups < self.commits[lanes] - most)
            if done.any():
                words = (flat[done] // 4)[:, None] + np.arange(data.shape[1])
                shared.views[4][words] = data[done]
                shared.land(cells[done], self.stamp(lanes[done])[:, None])
                shared.dirty[cells[done]] = 1
            if not done.all():
                left.append((lanes[~done], groups[~done], cells[~done], flat[~done], data[~done]))
        self.copies = left

    def fence(self, guard) -> None:
        """Make stores visible to the asynchronous proxy: those of the whole CTA, which executes it
        together.
        """
        for cta in np.unique(self.cta[self.lanes(guard)]):
            cells = self.shared.size // self.shared.cell
            self.shared.dirty[cta * cells : (cta + 1) * cells] = 0

    def wgmma(self, R, targets, a, b, adds, across, kind, width, m, at) -> None:
        """Multiply at once. Until it is waited for, what it reads stays busy, its result is NaN."""
        self.together(m, at)
        groups = [g for g in range(self.T // 128) if m is None or m[g * 128]]
        accumulators = [self._accumulator(R, target) for target in targets]
        what, sums = self.code.texts[at].split("{")[0], np.stack([a.values for a in accumulators])
        for group in groups:
            threads = slice(group * 128, group * 128 + 128)
            if isinstance(a, tuple):
                left = tensor_cores.wgmma_a([R[i][threads] for i in a], kind)
            else:
                left = self._operand(int(a[threads.start]), 64, across[0], kind, group, what)
            bits = int(self.full(b)[threads.start])
            right = self._operand(bits, int(width), across[1], kind, group, what)
            before = tensor_cores.wgmma_sum(sums[:, threads]) if adds[threads.start] else 0
            total = np.ascontiguousarray(before + left @ right.T, dtype=np.float32)
            sums[:, threads] = tensor_cores.wgmma_spread(total)
        lanes = np.isin(np.arange(self.T) // 128, groups)
        for i, (target, accumulator) in enumerate(zip(targets, accumulators, strict=True)):
            accumulator.values = sums[i]
            accumulator.group[groups] = self.product_groups[groups]
            accumulator.under_way[groups] = True
            R[target] = np.where(lanes, np.uint32(0xFFFFFFFF), R[target])

    def _accumulator(self, R, target: int) -> Accumulator:
        """The register as wgmma sees it: the sum under way if there is one, else its value."""
        if target not in self.accumulators:
            zeros = np.zeros(self.T // 128, np.int64)
            self.accumulators[target] = Accumulator(R[target], zeros, zeros.astype(bool))
        one = self.accumulators[target]
        one.values = np.where(np.repeat(one.under_way, 128), one.values, R[target])
        return one

    def _operand(self, bits, rows, across, kind, group, what) -> np.ndarray:
        """Return fp32 [rows,16] behind a descriptor."""
        shared, cta = self.shared, group * 128 // self.per
        chunks = tensor_cores.Operand(bits).chunks(rows, 16, bool(across))
        flat = shared.flat(chunks.ravel(), cta, 16, what)
        cells = shared.cells(flat, 16)
        stamp = np.full(len(flat), shared.epoch[cta] * 1024 + MANY - 1, np.int32)
        shared.reads(cells, stamp, what, asynchronous=True)
        shared.busy[cells] += 1
        self.products.append((group, self.product_groups[group], cells, cta))
        halves = shared.views[2][(flat // 2)[:, None] + np.arange(8)]
        matrix = halves.reshape(16, rows).T if across else halves.reshape(rows, 16)
        return tensor_cores.widened(np.ascontiguousarray(matrix), kind)

    def wgmma_commit(self, m) -> None:
        """Close a group of products."""
        self.product_groups[:] += 1 if m is None else m[::128].astype(int)

    def wgmma_wait(self, R, most: int, m) -> None:
        """Wait until at most `most` groups of products are under way."""
        shared, left = self.shared, []
        for target, one in self.accumulators.items():
            over = one.under_way & (one.group < self.product_groups - most)
            over &= True if m is None else m[::128]
            if over.any():
                R[target] = np.where(np.repeat(over, 128), one.values, R[target])
                one.under_way &= ~over
        for group, number, cells, cta in self.products:
            if (m is None or m[group * 128]) and number < self.product_groups[group] - most:
                shared.busy[cells] -= 1
                shared.read[cells] = shared.epoch[cta] * 1024 + MANY
            else:
                left.append((group, number, cells, cta))
        self.products = left

    def _each(self, guard, address) -> list[tuple[int, int, int]]:
        """Return (thread, CTA, shared address) of every thread of a guard."""
        address = self.full(address)
        lanes = self.lanes(guard)
        return [(int(lane), int(self.cta[lane]), int(address[lane])) for lane in lanes]

    def mbarrier_init(self, address, count, guard) -> None:
        """Make mbarriers that expect `count` arrivals."""
        for lane, cta, place in self._each(guard, address):
            self.barriers[cta, place] = Barrier(int(count[lane]))

    def mbarrier_arrive(self, address, expected, guard, at) -> None:
        """Arrive; expected: bytes that the phase has to wait for."""
        for lane, cta, place in self._each(guard, address):
            barrier = self._barrier(cta, place, at)
            barrier.arrived += 1
            barrier.left += int(expected[lane])
            self._turn(barrier)

    def _barrier(self, cta: int, place: int, at: int) -> Barrier:
        if (cta, place) not in self.barriers:
            raise Fault(f"mbarrier was not initialised: {self.code.texts[at]}")
        return self.barriers[cta, place]

    def _turn(self, barrier: Barrier) -> None:
        """Begin the next phase if this one is complete, and wake those that wait."""
        if barrier.arrived > barrier.count:
            raise Fault("more arrivals than an mbarrier expects")
        if barrier.arrived == barrier.count and barrier.left == 0:
            barrier.arrived, barrier.phase = 0, barrier.phase + 1
            self.sleeps[:] = False

    def mbarrier_wait(self, address, parity, m, at) -> np.ndarray:
        """Return True where the phase of a parity is over; other threads sleep until one turns."""
        address, over = self.full(address), np.ones(self.T, bool)
        lanes = self.lanes(m)
        columns = self.cta[lanes], address[lanes].astype(np.int64), parity[lanes].astype(np.int64)
        keys, inverse = np.unique(np.stack(columns, axis=1), axis=0, return_inverse=True)
        phases = [self._barrier(int(cta), int(place), at).phase & 1 for cta, place, _ in keys]
        over[lanes] = (np.array(phases) != keys[:, 2])[inverse.ravel()]
        self.sleeps[lanes] = ~over[lanes]
        return over

    def tma_load(self, target, map_at, corner, barrier, guard, at) -> None:
        """Start the load of a box."""
        what, shared = self.code.texts[at], self.shared
        target, barrier, map_at = self.full(target), self.full(barrier), self.full(map_at)
        for lane in self.lanes(guard):
            box, cta = self.map_at(int(map_at[lane]), what), int(self.cta[lane])
            flat = shared.flat(box.shared(int(target[lane])), cta, box.itemsize, what)
            cells = np.unique(flat // shared.cell)
            stamp = self.stamp(np.array([lane]))[0]
            shared.writes(cells[:, None], np.full(len(cells), stamp), what)
            shared.depart(cells)
            self._barrier(cta, int(barrier[lane]), at)
            first = [int(axis[lane]) for axis in corner]
            self.loads.append(Load(box, first, flat, cells, cta, int(barrier[lane])))

    def land(self, load: Load) -> None:
        """Let a load arrive."""
        unit = load.tensor_map.itemsize
        address, inside = load.tensor_map.place(load.corner)
        data = np.zeros(len(load.flat), f"u{unit}")
        data[inside] = self.memory.load(address[inside].astype(np.uint64), unit, 1, "TMA load")[
            :, 0
        ]
        self.shared.views[unit][load.flat // unit] = data
        self.shared.land(load.cells, 0)
        self.shared.dirty[load.cells] = 0
        barrier = self.barriers[load.cta, load.barrier]
        barrier.left -= load.tensor_map.bytes
        self._turn(barrier)

    def tma_store(self, map_at, corner, source, guard, at) -> None:
        """Store a box. Until it is waited for, what it reads stays busy."""
        what, shared = self.code.texts[at], self.shared
        source, map_at = self.full(source), self.full(map_at)
        for lane in self.lanes(guard):
            box, cta = self.map_at(int(map_at[lane]), what), int(self.cta[lane])
            flat = shared.flat(box.shared(int(source[lane])), cta, box.itemsize, what)
            cells = np.unique(flat // shared.cell)
            stamp = np.full(len(cells), self.stamp(np.array([lane]))[0])
            shared.reads(cells[:, None], stamp, what, asynchronous=True)
            shared.busy[cells] += 1
            self.stores.append((int(lane), int(self.bulks[lane]), cells))
            address, inside = box.place([int(axis[lane]) for axis in corner])
            data = shared.views[box.itemsize][flat[inside] // box.itemsize]
            self.memory.store(address[inside].astype(np.uint64), data[:, None], what)

    def bulk_commit(self, guard) -> None:
        """Close a group of TMA stores."""
        self.bulks[slice(None) if guard is None else guard] += 1

    def bulk_wait(self, most: int, guard) -> None:
        """Wait until at most `most` groups of a thread's TMA stores read shared memory."""
        active, shared, left = self.all if guard is None else guard, self.shared, []
        for lane, group, cells in self.stores:
            if active[lane] and group < self.bulks[lane] - most:
                shared.busy[cells] -= 1
                shared.read[cells] = self.stamp(np.array([lane]))[0]
            else:
                left.append((lane, group, cells))
        self.stores = left
