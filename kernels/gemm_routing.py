"""Which way a base product with its low-rank part goes: a GEMM of ours with both in one sum, or torch's with the rest beside it.

Pure: a choice follows from shapes, dtypes and the architecture's name alone, never from a clock, so every rank of a job chooses
alike. A measured row of TABLE decides where there is one (`lorafast-bench tune` prints them); elsewhere a roofline does, with
published figures of the devices and an assumed efficiency of our GEMMs. Imports no triton.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from contextvars import ContextVar
from typing import NamedTuple

import torch

from lorafast.engine.kernels import configs
from lorafast.engine.kernels.configs import Tile
from lorafast.engine.kernels.gpu_specs import device

# Of what torch's GEMM reaches. Assumed: no GEMM of ours has been timed yet.
EFFICIENCY = {"tma": 0.93, "pointers": 0.85}
LAUNCH = 3e-6
# What a multiprocessor gets from the L2 cache, in its share of memory's bandwidth: small tiles ask for the same operands often.
CACHE = 2.4


class Asked(NamedTuple):
    """One product: rows, columns, the lengths of its base summands, R of all that is low-rank together (0 for none).

    by_row: the weight's rows are dense along the sum; masked: some of the low-rank part is dropped from; many: there are more
    summands than a base and its low-rank part; ends: passes over the result that an epilogue saves, for a gain or a second output;
    aligned: TMA descriptors can hold every operand; fusable: a GEMM of ours can hold the summands at all.
    """

    M: int
    N: int
    K: tuple[int, ...]
    R: int
    dtype: torch.dtype
    arch: str
    by_row: bool = True
    masked: bool = False
    many: bool = False
    ends: int = 0
    aligned: bool = True
    fusable: bool = True


class Row(NamedTuple):
    """A measured choice: the form, and for ours its tile and whether programs share a sum, as many as the rows then ask for."""

    form: str
    tile: Tile | None = None
    split: bool = False


class Route(NamedTuple):
    """form: tma or pointers (ours); low first or base first (torch's, in that order).

    programs: as many as walk over the tiles (tma); splits: programs that share a tile's sum, `share` steps each (pointers).
    """

    form: str
    tile: Tile | None = None
    programs: int = 0
    splits: int = 1
    share: int = 0

    @property
    def fused(self) -> bool:
        """Whether the low-rank part enters the base product's own sum."""
        return self.form in EFFICIENCY

    @property
    def row(self) -> Row:
        """What the table would say of it."""
        return Row(self.form, self.tile, self.splits > 1)

    def __str__(self) -> str:
        if self.tile is None:
            return f"torch's, {self.form}"
        tile = self.tile
        return f"{self.form} {tile.BLOCK_M}x{tile.BLOCK_N}x{tile.BLOCK_K}{f' in {self.splits}' if self.splits > 1 else ''}"


class Key(NamedTuple):
    """What a measured row is found by. M is rounded up to a power of two, R to a tile."""

    arch: str
    dtype: str
    M: int
    N: int
    K: tuple[int, ...]
    R: int
    by_row: bool
    masked: bool
    ends: int


# None yet.
TABLE: dict[Key, Row] = {}
_forced: ContextVar[Route | None] = ContextVar("forced", default=None)


@contextlib.contextmanager
def taking(route: Route) -> Iterator[None]:
    """Inside, and in this thread, every product goes this way, which must be able to: for measuring and for tests."""
    token = _forced.set(route)
    try:
        yield
    finally:
        _forced.reset(token)


def key(asked: Asked) -> Key:
    """The row that would decide this."""
    rounded = 1 << max(0, asked.M - 1).bit_length()
    rank = -(-asked.R // 16) * 16
    return Key(
        asked.arch,
        str(asked.dtype).removeprefix("torch."),
        rounded,
        asked.N,
        asked.K,
        rank,
        asked.by_row,
        asked.masked,
        asked.ends,
    )


def pick(asked: Asked) -> Route:
    """The measured route if there is one, else the one the roofline holds for the fastest; ours in Triton's interpreter."""
    return _forced.get() or _picked(asked)


@functools.lru_cache(maxsize=4096)
def _picked(asked: Asked) -> Route:
    able = candidates(asked)
    for route in able:
        if TABLE.get(key(asked)) == route.row:
            return route
    if asked.arch == "cpu" and able[0].fused:
        return able[0]
    return min(able, key=lambda route: (seconds(asked, route), _padded(asked, route)))


def candidates(asked: Asked) -> list[Route]:
    """Every route that can do it, torch's last."""
    able = []
    if asked.fusable:
        able = [
            route
            for form in EFFICIENCY
            for tile in _tiles(asked, form)
            for route in _sized(asked, form, tile)
        ]
    orders = (
        ("low first", "base first") if asked.R and asked.dtype != torch.float32 else ("base first",)
    )
    return [*able, *map(Route, orders)]


def _tiles(asked: Asked, form: str) -> tuple[Tile, ...]:
    if form == "tma" and not (
        asked.aligned and asked.dtype != torch.float32 and device(asked.arch).tma
    ):
        return ()
    return configs.gemm(form, asked.dtype, asked.masked, asked.many)


def _sized(asked: Asked, form: str, tile: Tile) -> list[Route]:
    """A tile's routes: a program a tile, or as many as run at once; and where those are few, with the sum split among more."""
    tiles, steps = _count(asked, tile), _steps(asked, tile.BLOCK_K)
    slots = device(asked.arch).multiprocessors
    if form == "tma":
        return [Route(form, tile, min(tiles, slots), 1, steps)]
    splittable = not asked.masked and tile.BLOCK_M <= configs.SPLIT_ROWS
    wanted = max(1, min(slots // max(1, tiles), steps // 4)) if splittable else 1
    shares = dict.fromkeys((max(1, steps), max(1, -(-steps // wanted))))
    return [Route(form, tile, 0, max(1, -(-steps // share)), share) for share in shares]


def seconds(asked: Asked, route: Route) -> float:
    """What the roofline expects of a route: its busiest multiprocessor or its memory traffic, and its launches."""
    e, facts = asked.dtype.itemsize, device(asked.arch)
    depth = sum(asked.K)
    moved = e * (asked.M * depth + depth * asked.N + asked.M * asked.N)
    result = e * asked.M * asked.N / facts.memory
    if route.fused:
        compute = (
            _compute(asked, route.tile, _steps(asked, route.tile.BLOCK_K), route.splits)
            / EFFICIENCY[route.form]
        )
        parts = 8 * route.splits * asked.M * asked.N / facts.memory if route.splits > 1 else 0
        return max(compute, moved / facts.memory) + parts + LAUNCH * (2 if route.splits > 1 else 1)
    base = max(
        min(_library(asked, depth, tile) for tile in configs.LIBRARY_TILES), moved / facts.memory
    )
    # A library splits a sum whose tiles are few, too.
    base += LAUNCH * (_count(asked, configs.LIBRARY_TILES[-1]) < facts.multiprocessors)
    # The sum so far is read and written again; where it comes first, reading it hides behind the base product.
    beside = 0 if not asked.R else result * (1.5 if route.form == "low first" else 2) + LAUNCH
    return (
        base
        + beside
        + (len(asked.K) - 1) * 2 * result
        + asked.ends * (2 * result + LAUNCH)
        + LAUNCH
    )


def _padded(asked: Asked, route: Route) -> int:
    """Elements of the tiles together: where memory bounds several routes alike, the one with the least to multiply is taken."""
    return (
        0
        if route.tile is None
        else _count(asked, route.tile) * route.tile.BLOCK_M * route.tile.BLOCK_N
    )


def _count(asked: Asked, tile: Tile) -> int:
    return math.ceil(asked.M / tile.BLOCK_M) * math.ceil(asked.N / tile.BLOCK_N)


def _steps(asked: Asked, depth: int) -> int:
    """All steps of a tile's sum."""
    return sum(math.ceil(length / depth) for length in (*asked.K, asked.R))


def _library(asked: Asked, depth: int, tile: Tile) -> float:
    splits = max(1, device(asked.arch).multiprocessors // max(1, _count(asked, tile)))
    return _compute(asked, tile, math.ceil(depth / tile.BLOCK_K), splits)


def _compute(asked: Asked, tile: Tile, steps: int, splits: int) -> float:
    """Seconds the busiest multiprocessor multiplies, or waits for its operands."""
    facts = device(asked.arch)
    flops = facts.full if asked.dtype == torch.float32 else facts.half
    multiplied = 2 * tile.BLOCK_M * tile.BLOCK_N * tile.BLOCK_K / flops
    read = (
        asked.dtype.itemsize * (tile.BLOCK_M + tile.BLOCK_N) * tile.BLOCK_K / (CACHE * facts.memory)
    )
    waves = math.ceil(_count(asked, tile) * splits / facts.multiprocessors)
    return waves * math.ceil(steps / splits) * max(multiplied, read) * facts.multiprocessors
