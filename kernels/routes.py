"""Which way a base product with its low-rank part goes: a GEMM of ours with both in one sum, or torch's with the rest beside it.

Pure: a choice follows from shapes, dtypes and the architecture's name alone, never from a clock, so every rank of a job chooses
alike. A measured row of TABLE decides where there is one (`lorafast-bench tune` prints them); elsewhere a roofline does, with
published figures of the devices and an assumed efficiency of our GEMMs. Imports no triton.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

from lorafast.kernels import configs
from lorafast.kernels.configs import Tile


class Device(NamedTuple):
    """What a roofline knows: multiprocessors, flop/s of half- and full-precision products, bytes/s of memory."""

    multiprocessors: int
    half: float
    full: float
    memory: float


# Published peaks, taken down to what large products and copies reach.
DEVICES = {
    "sm_80": Device(108, 260e12, 17e12, 1.7e12),
    "sm_86": Device(82, 130e12, 30e12, 0.80e12),
    "sm_89": Device(128, 150e12, 70e12, 0.90e12),
    "sm_90": Device(132, 700e12, 50e12, 4.0e12),
    "sm_100": Device(148, 1500e12, 65e12, 7.0e12),
    "sm_120": Device(170, 200e12, 90e12, 1.6e12),
}
# Of what torch's GEMM reaches. Assumed: no GEMM of ours has been timed yet.
EFFICIENCY = {"tma": 0.93, "pointers": 0.85}
LAUNCH = 3e-6
# What the L2 cache hands to multiprocessors beside what memory does: small tiles ask for the same operands again and again.
CACHE = 2.4


class Asked(NamedTuple):
    """One product: rows, columns, the lengths of its base summands, R of all that is low-rank together (0 for none).

    masked: the low-rank part is dropped from; ends: passes over the result that an epilogue saves, for a gain or a second output;
    aligned: TMA descriptors can hold every operand; fusable: a GEMM of ours can hold the summands at all.
    """

    M: int
    N: int
    K: tuple[int, ...]
    R: int
    dtype: torch.dtype
    arch: str
    masked: bool = False
    ends: int = 0
    aligned: bool = True
    fusable: bool = True

    @property
    def many(self) -> bool:
        """Whether there are more summands than a base and its low-rank part."""
        return len(self.K) > 1


class Route(NamedTuple):
    """form: tma or pointers (ours); low first or base first (torch's, in that order). splits programs of `share` steps a tile."""

    form: str
    tile: Tile | None = None
    programs: int = 0
    splits: int = 1
    share: int = 0

    @property
    def fused(self) -> bool:
        """Whether the low-rank part enters the base product's own sum."""
        return self.form in EFFICIENCY


class Key(NamedTuple):
    """What a measured row is found by. M is rounded up to a power of two, R to a tile."""

    arch: str
    dtype: str
    M: int
    N: int
    K: tuple[int, ...]
    R: int
    masked: bool


# Measured choices: the form, and for ours its tile. None yet.
TABLE: dict[Key, tuple[str, Tile | None]] = {}


def key(asked: Asked) -> Key:
    """The row that would decide this."""
    rounded = 1 << max(0, asked.M - 1).bit_length()
    rank = -(-asked.R // 16) * 16
    return Key(asked.arch, str(asked.dtype).removeprefix("torch."), rounded, asked.N, asked.K, rank, asked.masked)


@functools.lru_cache(maxsize=4096)
def pick(asked: Asked) -> Route:
    """The measured route if there is one, else the one the roofline holds for the fastest; ours in Triton's interpreter."""
    able = candidates(asked)
    for route in able:
        if TABLE.get(key(asked)) == (route.form, route.tile):
            return route
    if asked.arch == "cpu" and able[0].fused:
        return able[0]
    return min(able, key=lambda route: seconds(asked, route))


def candidates(asked: Asked) -> list[Route]:
    """Every route that can do it, torch's last."""
    able = [] if not asked.fusable else [_sized(asked, form, tile) for form in EFFICIENCY for tile in _tiles(asked, form)]
    orders = ("low first", "base first") if asked.R and asked.dtype != torch.float32 else ("base first",)
    return [*able, *map(Route, orders)]


def _tiles(asked: Asked, form: str) -> tuple[Tile, ...]:
    if form == "tma" and not (asked.aligned and asked.dtype != torch.float32 and _has_tma(asked.arch)):
        return ()
    return configs.gemm(form, asked.dtype, asked.masked, asked.many)


def _has_tma(arch: str) -> bool:
    name = arch.removeprefix("sm_")
    return name.isdigit() and int(name) >= 90


def _sized(asked: Asked, form: str, tile: Tile) -> Route:
    """A tile's route: as many programs as run at once, or the sum split until they are."""
    tiles, steps = _count(asked, tile), _steps(asked, tile.BLOCK_K)
    slots = device(asked.arch).multiprocessors
    if form == "tma":
        return Route(form, tile, min(tiles, slots), 1, steps)
    splittable = not asked.masked and tile.BLOCK_M <= configs.SPLIT_ROWS
    wanted = max(1, min(slots // max(1, tiles), steps // 4)) if splittable else 1
    share = max(1, -(-steps // wanted))
    return Route(form, tile, tiles, max(1, -(-steps // share)), share)


def seconds(asked: Asked, route: Route) -> float:
    """What the roofline expects of a route: its busiest multiprocessor or its memory traffic, and its launches."""
    e, facts = asked.dtype.itemsize, device(asked.arch)
    depth = sum(asked.K)
    moved = e * (asked.M * depth + depth * asked.N + asked.M * asked.N)
    result = e * asked.M * asked.N / facts.memory
    if route.fused:
        compute = _compute(asked, route.tile, _steps(asked, route.tile.BLOCK_K), route.splits) / EFFICIENCY[route.form]
        parts = 8 * route.splits * asked.M * asked.N / facts.memory if route.splits > 1 else 0
        return max(compute, moved / facts.memory) + parts + LAUNCH * (2 if route.splits > 1 else 1)
    base = max(min(_library(asked, depth, tile) for tile in configs.LIBRARY_TILES), moved / facts.memory)
    # A library splits a sum whose tiles are few, too.
    base += LAUNCH * (_count(asked, configs.LIBRARY_TILES[-1]) < facts.multiprocessors)
    # The sum so far is read and written again; where it comes first, reading it hides behind the base product.
    beside = 0 if not asked.R else result * (1.5 if route.form == "low first" else 2) + LAUNCH
    return base + beside + (len(asked.K) - 1) * 2 * result + asked.ends * (2 * result + LAUNCH) + LAUNCH


def device(arch: str) -> Device:
    """The facts about an architecture; of one that is not listed, those of the slowest that is older, else of the oldest."""
    if arch in DEVICES:
        return DEVICES[arch]
    older = [name for name in DEVICES if name.removeprefix("sm_").isdigit() and _number(name) <= _number(arch)]
    return min((DEVICES[name] for name in older), key=lambda facts: facts.half, default=DEVICES["sm_80"])


def _number(arch: str) -> int:
    digits = arch.removeprefix("sm_")
    return int(digits) if digits.isdigit() else 0


def _count(asked: Asked, tile: Tile) -> int:
    return math.ceil(asked.M / tile.BLOCK_M) * math.ceil(asked.N / tile.BLOCK_N)


def _steps(asked: Asked, depth: int) -> int:
    """All steps of a tile's sum."""
    return sum(math.ceil(length / depth) for length in (*asked.K, asked.R))


def _library(asked: Asked, depth: int, tile: Tile) -> float:
    splits = max(1, device(asked.arch).multiprocessors // _count(asked, tile))
    return _compute(asked, tile, math.ceil(depth / tile.BLOCK_K), splits)


def _compute(asked: Asked, tile: Tile, steps: int, splits: int) -> float:
    """Seconds the busiest multiprocessor multiplies, or all of them wait for the L2 cache."""
    facts = device(asked.arch)
    flops = facts.full if asked.dtype == torch.float32 else facts.half
    tiles = _count(asked, tile)
    step = 2 * tile.BLOCK_M * tile.BLOCK_N * tile.BLOCK_K * facts.multiprocessors / flops
    read = asked.dtype.itemsize * (tile.BLOCK_M + tile.BLOCK_N) * tile.BLOCK_K * tiles * steps
    return max(math.ceil(tiles * splits / facts.multiprocessors) * math.ceil(steps / splits) * step, read / (CACHE * facts.memory))
