"""Tiles of the Triton kernels: which rows there are, and a pure choice among them. Imports no triton.

Rows are written down, never searched at call time, so every rank of a job makes the same choice. None has been measured yet: the
choices follow from how many programs fill a GPU, and from what compiles without spills (tests/test_compiles.py).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from lorafast.engine.kernels.gpu_specs import device

# Ranks a kernel's tile may hold; R is padded to the next.
BLOCKS_R = (16, 64, 128, 256)
MAX_RANK = BLOCKS_R[-1]


class Tile(NamedTuple):
    """One compiled form of a kernel: its block sizes (0 where it has none), warps and pipeline stages."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    BLOCK_R: int
    warps: int
    stages: int

    def blocks(self, *names: str) -> dict[str, int]:
        """The block sizes a streaming kernel takes, by name, that of the ranks among them."""
        return self.edges(*names, "BLOCK_R")

    def edges(self, *names: str) -> dict[str, int]:
        """Block sizes by name."""
        return {name: getattr(self, name) for name in names}


class Share(NamedTuple):
    """A tile, and how the axis that is summed over is shared: `splits` programs of `steps` blocks each."""

    tile: Tile
    splits: int
    steps: int


def ceil_div(length: int, block: int) -> int:
    """How many blocks cover a length. (triton.cdiv does too, in five microseconds.)"""
    return -(-length // block)


def block_r(R: int) -> int:
    """R padded to a tile. ValueError beyond MAX_RANK."""
    for block in BLOCKS_R:
        if block >= R:
            return block
    raise ValueError(f"R={R} exceeds {MAX_RANK}, the largest rank a kernel's tile holds")


def mixes(R: int, dtype: torch.dtype) -> bool:
    """Whether an R×R core is multiplied from registers, where project's parts are added; a wider one is torch's product."""
    widest = 16 if dtype == torch.float32 else 64
    return widest >= R


def project(M: int, K: int, R: int, dtype: torch.dtype, arch: str) -> Share:
    """Rows of x on the grid; K is split where they are too few to fill the GPU."""
    few, many = _PROJECT[dtype == torch.float32][block_r(R)]
    # Few rows are split into parts, which then fill the GPU.
    tile = many if 32 * device(arch).multiprocessors <= M else few
    return _shared(tile, ceil_div(M, tile.BLOCK_M), ceil_div(K, tile.BLOCK_K), arch)


def grad_project(M: int, K: int, R: int, dtype: torch.dtype, arch: str) -> Share:
    """Columns of x on the grid; the rows are split until they fill the GPU."""
    tile = _GRAD_PROJECT[dtype == torch.float32][block_r(R)]
    return _shared(tile, ceil_div(K, tile.BLOCK_K), ceil_div(M, tile.BLOCK_M), arch)


def grad_output(M: int, N: int, R: int, dtype: torch.dtype, arch: str) -> Share:
    """Columns of dy on the grid, wide ones, because every block of columns writes parts of u; the rows are split."""
    tile = _GRAD_OUTPUT[dtype == torch.float32][block_r(R)]
    return _shared(tile, ceil_div(N, tile.BLOCK_N), ceil_div(M, tile.BLOCK_M), arch)


def one_pass(R: int, ranks: int, dtype: torch.dtype) -> bool:
    """Whether grad_output finds R columns of u in its pass over dy, beside `ranks` of P: while the fp32 parts that every block of
    columns writes, and that are read again, are less than a second reading of dy.
    """
    tile = _GRAD_OUTPUT[dtype == torch.float32][block_r(max(R, ranks))]
    return dtype.itemsize * tile.BLOCK_N // 8 > R


def row_norm(R: int, dtype: torch.dtype) -> Tile:
    """Rows (or columns) of W on the grid."""
    return _ROW_NORM[dtype == torch.float32][block_r(R)]


def finish(R: int) -> Tile:
    """Few rows a program: the parts to add are many, the work on each is small."""
    return Tile(16, 0, 0, block_r(R), 4, 1)


def finish_P(R: int) -> Tile:
    """Rows of dB, and all its ranks."""
    return Tile(0, 16, 0, block_r(R), 4, 1)


def masked_add(dtype: torch.dtype) -> Tile:
    """A tile of dx; the ranks in steps of 16."""
    return Tile(64, 0, 64 if dtype == torch.float32 else 128, 16, 4, 1)


# A square of a factor.
FACTOR = Tile(0, 32, 32, 0, 4, 1)

# By whether x is fp32, which in full precision has no tensor cores and wants registers, and by tile of ranks. Each of these
# compiles without a spill on every architecture and in every form; many a neighbour does not.
_PROJECT = {  # few rows, many rows
    False: {
        16: (Tile(16, 0, 128, 16, 4, 3), Tile(64, 0, 128, 16, 4, 3)),
        64: (Tile(16, 0, 64, 64, 4, 3), Tile(64, 0, 64, 64, 8, 3)),
        128: (Tile(16, 0, 32, 128, 4, 3), Tile(64, 0, 64, 128, 8, 2)),
        256: (Tile(16, 0, 32, 256, 4, 2), Tile(32, 0, 32, 256, 8, 2)),
    },
    True: {
        16: (Tile(16, 0, 64, 16, 4, 3),) * 2,
        64: (Tile(16, 0, 32, 64, 4, 3),) * 2,
        128: (Tile(16, 0, 32, 128, 8, 2),) * 2,
        256: (Tile(16, 0, 16, 256, 8, 2),) * 2,
    },
}
_GRAD_PROJECT = {
    False: {
        16: Tile(64, 0, 128, 16, 4, 3),
        64: Tile(64, 0, 64, 64, 4, 3),
        128: Tile(64, 0, 64, 128, 8, 2),
        256: Tile(64, 0, 32, 256, 8, 2),
    },
    True: {
        16: Tile(64, 0, 64, 16, 4, 3),
        64: Tile(32, 0, 32, 64, 4, 3),
        128: Tile(32, 0, 32, 128, 8, 2),
        256: Tile(64, 0, 16, 256, 8, 2),
    },
}
_GRAD_OUTPUT = {
    False: {
        16: Tile(64, 256, 0, 16, 8, 2),
        64: Tile(32, 256, 0, 64, 8, 2),
        128: Tile(64, 64, 0, 128, 8, 2),
        256: Tile(64, 64, 0, 256, 8, 2),
    },
    True: {
        16: Tile(32, 128, 0, 16, 8, 2),
        64: Tile(32, 64, 0, 64, 8, 2),
        128: Tile(32, 64, 0, 128, 8, 2),
        256: Tile(32, 16, 0, 256, 8, 2),
    },
}
_ROW_NORM = {
    False: {
        16: Tile(0, 32, 64, 16, 4, 2),
        64: Tile(0, 32, 64, 64, 4, 2),
        128: Tile(0, 32, 32, 128, 4, 2),
        256: Tile(0, 32, 32, 256, 8, 2),
    },
    True: {
        16: Tile(0, 16, 32, 16, 8, 2),
        64: Tile(0, 16, 32, 64, 8, 2),
        128: Tile(0, 16, 16, 128, 8, 2),
        256: Tile(0, 16, 16, 256, 8, 2),
    },
}

# The GEMMs' tiles, largest first; under a mask the largest has a stage less, and room for one base summand only.
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
# The tallest tile whose sum may be split among programs: taller ones are asked for where there are enough of them.
SPLIT_ROWS = 64
# What a library's GEMM is taken to choose among, by a roofline.
LIBRARY_TILES = (*_TMA, *_HALF)


def gemm(form: str, dtype: torch.dtype, masked: bool, many: bool) -> tuple[Tile, ...]:
    """Tiles by form (tma, pointers), whether a low-rank summand is masked, and whether there are more than it and one base."""
    if form == "tma":
        return (_TMA_MASKED[many:] if masked else _TMA) if dtype != torch.float32 else ()
    able = _FULL if dtype == torch.float32 else _HALF
    # Sixteen rows are for decoding, which neither drops nor differentiates.
    return tuple(tile for tile in able if tile.BLOCK_M > 16) if masked or many else able


def tiles(kernel: str, dtype: torch.dtype) -> tuple[Tile, ...]:
    """Every tile a streaming kernel can be asked for in a dtype, whatever the problem."""
    wide = dtype == torch.float32
    found = {
        "project": [tile for pair in _PROJECT[wide].values() for tile in pair],
        "finish": [finish(R) for R in BLOCKS_R],
        "grad_project": _GRAD_PROJECT[wide].values(),
        "grad_output": _GRAD_OUTPUT[wide].values(),
        "finish_P": [finish_P(R) for R in BLOCKS_R],
        "factor": [FACTOR],
        "masked_add": [masked_add(dtype)],
        "row_norm": _ROW_NORM[wide].values(),
    }
    return tuple(dict.fromkeys(found[kernel]))


def _shared(tile: Tile, programs: int, blocks: int, arch: str) -> Share:
    """Split `blocks` steps so that two programs sit on every multiprocessor, each with at least four steps."""
    wanted = max(1, 2 * device(arch).multiprocessors // max(1, programs))
    splits = max(1, min(wanted, blocks // 4))
    steps = ceil_div(blocks, splits)
    return Share(tile, max(1, ceil_div(blocks, steps)) if steps else 1, steps)
