"""The route of a base product with its low-rank part: a fused GEMM of ours, or torch's products.

A fused GEMM adds both parts in one sum. Otherwise torch multiplies the base, and the low-rank part
is added before or after it.

A choice is a pure function of shapes, dtypes, architecture and number of multiprocessors, never of
a clock, so every rank of a job on equal GPUs makes the same choice. A measured row of TABLE decides
if there is one (`lorafast-bench tune` prints them). Otherwise a roofline model decides, with
published figures of the devices and an assumed efficiency of our GEMMs. Imports no triton.
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from collections.abc import Iterator
from typing import NamedTuple

import torch

from lorafast.engine.kernels import configs
from lorafast.engine.kernels.configs import Tile
from lorafast.engine.kernels.gpu_specs import CACHE, LAUNCH, Device, device
from lorafast.runtime.devices import Arch

# The forms of our GEMM.
FUSED = ("tma", "pointers")
# The integer and bit operations of the dropout mask for an element of the result, counted in the
# compiled code for sm_90 (tests/kernels/test_sass_loops.py): in the epilogue of our GEMM's masked
# sum, and in low_rank_add, which writes its result or adds to one.
MASK = {"fused": 3.6, "low first": 8.1, "base first": 11.6}
# The rows of an fp32 product below which torch's is taken: a tile of ours sums in one chain of
# multiply-adds, which errs more than a library's sums in lanes, and few rows do not even it out.
FEW_ROWS = 16


class RouteQuery(NamedTuple):
    """The facts about one product that decide its route.

    M, N: rows and columns of the result. K: the lengths of the base summands. R: the sum of the
    low-rank parts' ranks, 0 if there is none. by_row: the weight's rows are dense along the sum.
    masked: dropout masks a low-rank part. many_summands: there are more than a base and a low-rank
    summand. epilogue_passes: passes over the result that an epilogue saves, for a gain or a second
    output. aligned: TMA descriptors can describe every operand. fusable: our GEMM can take all
    summands. specs: the device as it was measured; None: the published figures of its architecture,
    and assumed speeds of our GEMM.
    """

    M: int
    N: int
    K: tuple[int, ...]
    R: int
    dtype: torch.dtype
    arch: Arch
    by_row: bool = True
    masked: bool = False
    many_summands: bool = False
    epilogue_passes: int = 0
    aligned: bool = True
    fusable: bool = True
    specs: Device | None = None

    @property
    def device(self) -> Device:
        """The specification of the device."""
        return self.specs or device(self.arch)


class Row(NamedTuple):
    """A measured choice: the form, and for our GEMM the tile and whether the sum is split.

    The number of splits is not part of it; it follows from the exact number of rows.
    """

    form: str
    tile: Tile | None = None
    split: bool = False


class Route(NamedTuple):
    """One way to compute a product.

    form: "tma" or "pointers" (our GEMM), "low first" or "base first" (torch's products, in that
    order). programs: how many loop over the tiles (tma). splits: the programs that share the sum of
    a tile, with steps_per_split steps each (pointers).
    """

    form: str
    tile: Tile | None = None
    programs: int = 0
    splits: int = 1
    steps_per_split: int = 0

    @property
    def fused(self) -> bool:
        """True if the low-rank part is added in the base product's own sum."""
        return self.form in FUSED

    @property
    def row(self) -> Row:
        """The row of TABLE that chooses this route."""
        return Row(self.form, self.tile, self.splits > 1)

    def __str__(self) -> str:
        if self.tile is None:
            return f"torch's, {self.form}"
        tile = self.tile
        split = f" in {self.splits}" if self.splits > 1 else ""
        return f"{self.form} {tile.BLOCK_M}x{tile.BLOCK_N}x{tile.BLOCK_K}{split}"


class Key(NamedTuple):
    """The key of a row of TABLE. M is rounded up to a power of two, R to a multiple of 16."""

    arch: str
    multiprocessors: int
    dtype: str
    M: int
    N: int
    K: tuple[int, ...]
    R: int
    by_row: bool
    masked: bool
    epilogue_passes: int


# Empty: nothing has been measured yet.
TABLE: dict[Key, Row] = {}
_forced: Route | None = None
_forcing = threading.RLock()


@contextlib.contextmanager
def forcing(route: Route) -> Iterator[None]:
    """Return a context in which every product of the process takes a route.

    That includes a backward pass, which runs in threads of its own on a GPU. Another thread's
    context waits for the end of this one. It serves measurements and tests; the products must be
    able to take the route.
    """
    global _forced
    with _forcing:
        before, _forced = _forced, route
        try:
            yield
        finally:
            _forced = before


def key(query: RouteQuery) -> Key:
    """Return the key of the row that decides a query."""
    return Key(
        query.arch.name,
        query.device.multiprocessors,
        str(query.dtype).removeprefix("torch."),
        1 << max(0, query.M - 1).bit_length(),
        query.N,
        query.K,
        -(-query.R // 16) * 16,
        query.by_row,
        query.masked,
        query.epilogue_passes,
    )


def pick(query: RouteQuery) -> Route:
    """Return the measured route if there is one, else the one with the least modelled time.

    In Triton's interpreter it is a fused GEMM if one is possible. Few rows in fp32 take torch's
    products.
    """
    return _forced or _picked(query)


@functools.lru_cache(maxsize=4096)
def _picked(query: RouteQuery) -> Route:
    routes = candidates(query)
    for route in routes:
        if TABLE.get(key(query)) == route.row:
            return route
    if query.dtype == torch.float32 and query.M < FEW_ROWS:
        routes = [route for route in routes if not route.fused]
    if query.arch.vendor == "cpu" and routes[0].fused:
        return routes[0]
    return min(
        routes, key=lambda route: (modelled_seconds(query, route), _tile_elements(query, route))
    )


def candidates(query: RouteQuery) -> list[Route]:
    """Return every route that a query can take, torch's products last."""
    fused = []
    if query.fusable:
        fused = [
            route
            for form in FUSED
            if query.device.speed(form)
            for tile in _tiles(query, form)
            for route in _routes_of_tile(query, form, tile)
        ]
    orders = (
        ("low first", "base first") if query.R and query.dtype != torch.float32 else ("base first",)
    )
    return [*fused, *map(Route, orders)]


def _tiles(query: RouteQuery, form: str) -> tuple[Tile, ...]:
    if form == "tma" and not (query.aligned and query.dtype != torch.float32 and query.device.tma):
        return ()
    return configs.gemm(form, query.dtype, query.masked, query.many_summands, query.arch.name)


def _routes_of_tile(query: RouteQuery, form: str, tile: Tile) -> list[Route]:
    """Return a tile's routes: one, and a second with the sum split if the tiles are few."""
    tiles, steps = _tile_count(query, tile), _steps(query, tile.BLOCK_K)
    slots = query.device.multiprocessors
    if form == "tma":
        return [Route(form, tile, min(tiles, slots), 1, steps)]
    splittable = not query.masked and tile.BLOCK_M <= configs.SPLIT_ROWS
    wanted = max(1, min(slots // max(1, tiles), steps // 4)) if splittable else 1
    shares = dict.fromkeys((max(1, steps), max(1, -(-steps // wanted))))
    return [Route(form, tile, 0, max(1, -(-steps // share)), share) for share in shares]


def modelled_seconds(query: RouteQuery, route: Route) -> float:
    """Return the modelled time of a route.

    It is the larger of the time of the busiest multiprocessor and that of the memory traffic, and
    the launches. A fused GEMM computes the mask while nothing is multiplied.
    """
    e, specs = query.dtype.itemsize, query.device
    depth = sum(query.K)
    moved = e * (query.M * depth + depth * query.N + query.M * query.N)
    result = e * query.M * query.N / specs.bandwidth
    if route.fused:
        steps = _steps(query, route.tile.BLOCK_K)
        compute = _compute(query, route.tile, steps, route.splits) / query.device.speed(route.form)
        split = route.splits > 1
        parts = 8 * route.splits * query.M * query.N / specs.bandwidth if split else 0
        compute += _mask(query, "fused")
        return max(compute, moved / specs.bandwidth) + parts + LAUNCH * (2 if split else 1)
    base = max(
        min(_library(query, depth, tile) for tile in configs.LIBRARY_TILES), moved / specs.bandwidth
    )
    # torch's library splits a sum, too, if its tiles are few.
    base += LAUNCH * (_tile_count(query, configs.LIBRARY_TILES[-1]) < specs.multiprocessors)
    # The second product reads and writes the first one's result. If the low-rank part comes first,
    # the read overlaps with the base product.
    low_rank = 0.0
    if query.R and route.form == "low first":
        low_rank = max(result, _mask(query, route.form)) + 0.5 * result + LAUNCH
    elif query.R:
        low_rank = max(2 * result, _mask(query, route.form)) + LAUNCH
    more_bases = (len(query.K) - 1) * 2 * result
    return base + low_rank + more_bases + query.epilogue_passes * (2 * result + LAUNCH) + LAUNCH


def _mask(query: RouteQuery, form: str) -> float:
    """Return the seconds of the dropout mask's logic, 0 without a mask."""
    return query.masked * MASK[form] * query.M * query.N / query.device.logic


def _tile_elements(query: RouteQuery, route: Route) -> int:
    """Return the elements of all tiles: of routes equally bound by memory the least is taken."""
    if route.tile is None:
        return 0
    return _tile_count(query, route.tile) * route.tile.BLOCK_M * route.tile.BLOCK_N


def _tile_count(query: RouteQuery, tile: Tile) -> int:
    return math.ceil(query.M / tile.BLOCK_M) * math.ceil(query.N / tile.BLOCK_N)


def _steps(query: RouteQuery, depth: int) -> int:
    """Return the number of steps of a tile's sum."""
    return sum(math.ceil(length / depth) for length in (*query.K, query.R))


def _library(query: RouteQuery, depth: int, tile: Tile) -> float:
    """Return the seconds of torch's GEMM with a tile."""
    splits = max(1, query.device.multiprocessors // max(1, _tile_count(query, tile)))
    return _compute(query, tile, math.ceil(depth / tile.BLOCK_K), splits)


def _compute(query: RouteQuery, tile: Tile, steps: int, splits: int) -> float:
    """Return the seconds that the busiest multiprocessor multiplies or loads its operands."""
    specs = query.device
    flops = specs.full_flops if query.dtype == torch.float32 else specs.half_flops
    multiplied = 2 * tile.BLOCK_M * tile.BLOCK_N * tile.BLOCK_K / flops
    read = (
        query.dtype.itemsize
        * (tile.BLOCK_M + tile.BLOCK_N)
        * tile.BLOCK_K
        / (CACHE * specs.bandwidth)
    )
    waves = math.ceil(_tile_count(query, tile) * splits / specs.multiprocessors)
    return waves * math.ceil(steps / splits) * max(multiplied, read) * specs.multiprocessors
