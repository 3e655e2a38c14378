"""The tiles of the Triton kernels, and the choice among them. Imports no triton.

A choice is a pure function of shapes, dtype and device; nothing is searched or timed at call
time, so every rank of a job makes the same choice. No tile has been measured on a GPU yet: the
choices follow from the number of programs that fill a GPU and from which tiles compile without
spills (tests/kernels/test_compiled_kernels.py).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from lorafast.engine.kernels.gpu_specs import CACHE, LAUNCH, device
from lorafast.runtime.devices import Arch

# The ranks that a kernel's tile may hold; R is padded to the next of them.
BLOCKS_R = (16, 64, 128, 256)
MAX_RANK = BLOCKS_R[-1]


class Tile(NamedTuple):
    """The block sizes of a kernel (0 for those it does not have), its warps and pipeline stages."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    BLOCK_R: int
    warps: int
    stages: int


class SplitTile(NamedTuple):
    """A tile, and the split of the summed axis: `splits` programs of `steps` blocks each."""

    tile: Tile
    splits: int
    steps: int


def ceil_div(length: int, block: int) -> int:
    """Return the number of blocks that cover a length, in less time than triton.cdiv."""
    return -(-length // block)


def block_r(R: int) -> int:
    """Return the smallest of BLOCKS_R that holds R. Raises ValueError beyond MAX_RANK."""
    for block in BLOCKS_R:
        if block >= R:
            return block
    raise ValueError(f"R={R} exceeds {MAX_RANK}, the largest rank a kernel's tile holds")


def core_in_registers(R: int, dtype: torch.dtype) -> bool:
    """True if project_finish multiplies an R×R core in registers; torch multiplies a wider one."""
    widest = 16 if dtype == torch.float32 else 64
    return widest >= R


@functools.lru_cache(maxsize=4096)
def project(M: int, K: int, R: int, dtype: torch.dtype, arch: Arch) -> SplitTile:
    """Return project's tile. The grid covers rows of x; K is split if they do not fill the GPU."""
    few, many = _PROJECT[dtype == torch.float32][block_r(R)]
    # With few rows the tile is small and K is split, so that enough programs fill the GPU.
    tile = many if 32 * device(arch).multiprocessors <= M else few
    tile = _on(arch.name, "project", tile)
    return _split(tile, ceil_div(M, tile.BLOCK_M), ceil_div(K, tile.BLOCK_K), arch)


@functools.lru_cache(maxsize=4096)
def grouped_project(
    S: int, experts: int, K: int, R: int, dtype: torch.dtype, arch: Arch
) -> SplitTile:
    """Return the tile of project for S rows of several experts, sorted by expert.

    It has few rows where an expert has few.
    """
    few, many = _PROJECT[dtype == torch.float32][block_r(R)]
    enough = max(32 * device(arch).multiprocessors, experts * many.BLOCK_M)
    tile = _on(arch.name, "project", many if enough <= S else few)
    return _split(tile, ceil_div(S, tile.BLOCK_M), ceil_div(K, tile.BLOCK_K), arch)


def casts_first(tile: Tile, M: int, K: int, R: int, arch: Arch) -> bool:
    """True if project casts an fp32 A to 16 bits in a launch of its own.

    Every block of rows reads all of A: half the bytes of that may take longer than a launch.
    """
    saved = 2 * ceil_div(M, tile.BLOCK_M) * R * K
    return saved > LAUNCH * CACHE * device(arch).bandwidth


@functools.lru_cache(maxsize=4096)
def grad_project(M: int, K: int, R: int, dtype: torch.dtype, arch: Arch) -> SplitTile:
    """Return grad_project's tile. The grid covers columns of x; rows are split to fill the GPU."""
    tile = _GRAD_PROJECT[dtype == torch.float32][block_r(R)]
    return _split(tile, ceil_div(K, tile.BLOCK_K), ceil_div(M, tile.BLOCK_M), arch)


@functools.lru_cache(maxsize=4096)
def grad_output(M: int, N: int, R: int, dtype: torch.dtype, arch: Arch, sums: int) -> SplitTile:
    """Return grad_output's tile. The grid covers columns of dy; rows are split to fill the GPU."""
    tile = grad_output_tile(block_r(R), dtype, sums, arch.name)
    return _split(tile, ceil_div(N, tile.BLOCK_N), ceil_div(M, tile.BLOCK_M), arch)


def grad_output_tile(block: int, dtype: torch.dtype, sums: int, arch: str = "") -> Tile:
    """Return grad_output's tile for a block of ranks.

    sums: 2 if a step reads a tile of kept, too. Each of the two then has half the rows. arch: the
    name of the architecture.
    """
    tile = _on(arch, "grad_output", _GRAD_OUTPUT[dtype == torch.float32][block])
    return tile._replace(BLOCK_M=tile.BLOCK_M // 2) if sums > 1 else tile


def rows_at_once(tile: Tile, dtype: torch.dtype) -> int:
    """Return the rows of a block of columns that a program loads at once, 16 bytes a thread."""
    return min(tile.BLOCK_M, max(1, 32 * tile.warps * 16 // dtype.itemsize // tile.BLOCK_N))


def one_pass(R: int, ranks: int) -> bool:
    """True if grad_output computes R columns of u in the pass over dy that computes `ranks` of P.

    Few ranks do: the fp32 parts of u, which every block of columns writes and a second kernel
    reads, are then fewer bytes than a second pass over dy, and there are registers for both sums.
    """
    return max(R, ranks) <= BLOCKS_R[0]


@functools.lru_cache(maxsize=4096)
def row_norm(N: int, K: int, R: int, dtype: torch.dtype, arch: Arch, by_row: bool) -> SplitTile:
    """Return row_norm's tile. The grid covers rows (or columns) of W, and splits their length."""
    tile = _ROW_NORM[dtype == torch.float32][block_r(R)]
    blocks = ceil_div(N, tile.BLOCK_N), ceil_div(K, tile.BLOCK_K)
    # A program has no more than one tile of W on its way.
    return _split(tile, *(blocks if by_row else reversed(blocks)), arch, 3)


def project_finish(R: int) -> Tile:
    """Return project_finish's tile: few rows a program, since many parts are added per row."""
    return Tile(16, 0, 0, block_r(R), 4, 1)


def grad_output_finish(R: int) -> Tile:
    """Return grad_output_finish's tile: rows of dB and all its ranks."""
    return Tile(0, 16, 0, block_r(R), 4, 1)


def low_rank_add(dtype: torch.dtype) -> Tile:
    """Return low_rank_add's tile: a block of dx, and 16 ranks a step."""
    return Tile(64, 0, 64 if dtype == torch.float32 else 128, 16, 4, 1)


def dequantise(dtype: torch.dtype) -> Tile:
    """Return dequantise's tile: a thread makes 16 bytes of adjacent numbers, and stores them."""
    return Tile(0, 0, 256 if dtype == torch.float32 else 512, 0, 4, 1)


# drop's tile: each thread has four groups of 8 neighbours, whose bits one Philox call gives.
DROP = Tile(32, 0, 128, 0, 4, 1)
# add_blocks' tile: columns of parts.
ADD_BLOCKS = Tile(0, 0, 512, 0, 4, 1)
# scale_cast's tile: a square of a factor.
SCALE_CAST = Tile(0, 32, 32, 0, 4, 1)

# By "x is fp32", which in full precision uses no tensor cores but many registers, and by BLOCK_R.
# Each tile compiles without a spill in every form on every architecture but those of _INSTEAD; many
# similar tiles do not.
_PROJECT = {  # few rows, many rows
    False: {
        16: (Tile(16, 0, 128, 16, 4, 3), Tile(64, 0, 128, 16, 4, 3)),
        64: (Tile(16, 0, 64, 64, 4, 3), Tile(64, 0, 64, 64, 8, 3)),
        128: (Tile(16, 0, 32, 128, 4, 3), Tile(64, 0, 64, 128, 8, 3)),
        256: (Tile(16, 0, 32, 256, 4, 3), Tile(32, 0, 32, 256, 8, 3)),
    },
    True: {
        16: (Tile(16, 0, 64, 16, 4, 3),) * 2,
        64: (Tile(16, 0, 32, 64, 4, 3),) * 2,
        128: (Tile(16, 0, 32, 128, 8, 3),) * 2,
        256: (Tile(16, 0, 16, 256, 8, 3),) * 2,
    },
}
_GRAD_PROJECT = {
    False: {
        16: Tile(64, 0, 128, 16, 4, 3),
        64: Tile(64, 0, 64, 64, 4, 3),
        128: Tile(64, 0, 64, 128, 8, 3),
        256: Tile(64, 0, 32, 256, 8, 3),
    },
    True: {
        16: Tile(64, 0, 64, 16, 4, 3),
        64: Tile(32, 0, 32, 64, 4, 3),
        128: Tile(32, 0, 32, 128, 8, 3),
        256: Tile(32, 0, 16, 256, 8, 3),
    },
}
_GRAD_OUTPUT = {
    False: {
        16: Tile(64, 128, 0, 16, 4, 3),
        64: Tile(64, 64, 0, 64, 4, 3),
        128: Tile(64, 64, 0, 128, 8, 3),
        256: Tile(64, 64, 0, 256, 8, 3),
    },
    True: {
        16: Tile(32, 128, 0, 16, 8, 3),
        64: Tile(32, 64, 0, 64, 8, 3),
        128: Tile(32, 64, 0, 128, 8, 3),
        256: Tile(32, 16, 0, 256, 8, 3),
    },
}
_ROW_NORM = {
    False: {
        16: Tile(0, 32, 128, 16, 4, 3),
        64: Tile(0, 32, 64, 64, 4, 3),
        128: Tile(0, 32, 32, 128, 4, 3),
        256: Tile(0, 32, 32, 256, 8, 3),
    },
    True: {
        16: Tile(0, 16, 32, 16, 8, 3),
        64: Tile(0, 16, 32, 64, 8, 3),
        128: Tile(0, 16, 16, 128, 8, 3),
        256: Tile(0, 16, 16, 256, 8, 3),
    },
}
# The tiles that need a stack on sm_120, and those in their place there and on its kin.
_INSTEAD_ON = ("sm_120", "sm_121")
_INSTEAD = {
    ("project", Tile(64, 0, 64, 64, 8, 3)): Tile(64, 0, 32, 64, 8, 3),
    ("grad_output", Tile(32, 64, 0, 128, 8, 3)): Tile(64, 32, 0, 128, 8, 3),
    ("gemm", Tile(64, 128, 16, 0, 8, 3)): Tile(64, 64, 16, 0, 8, 3),
}

# The GEMM's tiles, largest first. With a masked summand the largest one has one stage less, and its
# shared memory suffices for one base summand only.
_TMA = (Tile(128, 256, 64, 0, 8, 4), Tile(128, 128, 64, 0, 8, 4))
_TMA_MASKED = (Tile(128, 256, 64, 0, 8, 3), Tile(128, 128, 64, 0, 8, 4))
_HALF = (
    Tile(128, 128, 64, 0, 8, 3),
    Tile(64, 64, 64, 0, 4, 4),
    Tile(16, 64, 128, 0, 4, 4),
    Tile(16, 32, 128, 0, 4, 4),
)
_FULL = (Tile(64, 128, 16, 0, 8, 3), Tile(16, 64, 64, 0, 4, 3))
GEMM_FINISH = Tile(16, 128, 0, 0, 4, 1)
# The largest BLOCK_M whose sum may be split among programs. Larger tiles are for problems that have
# enough tiles.
SPLIT_ROWS = 64
# The tiles that the roofline assumes torch's GEMM to choose among.
LIBRARY_TILES = (*_TMA, *_HALF)


def gemm(
    form: str, dtype: torch.dtype, masked: bool, many_summands: bool, arch: str = ""
) -> tuple[Tile, ...]:
    """Return the GEMM's tiles for one form, "tma" or "pointers".

    masked: a low-rank summand is masked. many_summands: there are more than a base and a low-rank
    one. arch: the name of the architecture.
    """
    if form == "tma":
        return (_TMA_MASKED[many_summands:] if masked else _TMA) if dtype != torch.float32 else ()
    tiles = [_on(arch, "gemm", tile) for tile in (_FULL if dtype == torch.float32 else _HALF)]
    # Tiles of 16 rows serve decoding, which has no dropout and no backward pass.
    return tuple(tile for tile in tiles if tile.BLOCK_M > 16 or not (masked or many_summands))


def tiles(kernel: str, dtype: torch.dtype, arch: str = "") -> tuple[Tile, ...]:
    """Return every tile that a streaming kernel can be launched with in a dtype.

    arch: the name of the architecture.
    """
    full = dtype == torch.float32
    by_kernel = {
        "project": [
            _on(arch, "project", tile) for pair in _PROJECT[full].values() for tile in pair
        ],
        "project_finish": [project_finish(R) for R in BLOCKS_R],
        "grad_project": _GRAD_PROJECT[full].values(),
        "grad_output": [
            grad_output_tile(R, dtype, sums, arch) for R in BLOCKS_R for sums in (0, 2)
        ],
        "grad_output_finish": [grad_output_finish(R) for R in BLOCKS_R],
        "drop": [DROP],
        "dequantise": [dequantise(dtype)],
        "scale_cast": [SCALE_CAST],
        "low_rank_add": [low_rank_add(dtype)],
        "row_norm": _ROW_NORM[full].values(),
        "grouped_gain": [DROP],
        "add_blocks": [ADD_BLOCKS],
    }
    # A grouped kernel has the tiles of its primitive.
    own = kernel if kernel in by_kernel else kernel.removeprefix("grouped_")
    return tuple(dict.fromkeys(by_kernel[own]))


def _on(arch: str, kernel: str, tile: Tile) -> Tile:
    """Return a kernel's tile, or the one in its place on an architecture."""
    return _INSTEAD.get((kernel, tile), tile) if arch in _INSTEAD_ON else tile


def _split(tile: Tile, programs: int, blocks: int, arch: Arch, share: int = 2) -> SplitTile:
    """Split `blocks` steps: `share` programs a multiprocessor, at least four steps a program."""
    wanted = max(1, share * device(arch).multiprocessors // max(1, programs))
    splits = max(1, min(wanted, blocks // 4))
    steps = ceil_div(blocks, splits)
    return SplitTile(tile, max(1, ceil_div(blocks, steps)) if steps else 1, steps)
