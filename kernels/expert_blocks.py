"""Blocks of rows of one expert each, which every program finds from the offsets by itself.

The blocks of expert e have numbers from offsets[e] // rows + e on. Between the first numbers of two
experts lies room for all blocks of the first, so the numbers end with S // rows + E, which the host
knows without the offsets. Some numbers have no rows, one of each expert at most: their programs
return at once.
"""

import torch
import triton
import triton.language as tl

from lorafast.engine.kernels import configs, launch


@triton.jit
def expert_of_block(offsets_ptr, experts, block, rows, EXPERTS: tl.constexpr):
    """Return a block's expert, its first row, and the end of the expert's rows, int64 each.

    offsets int32 [experts+1]; EXPERTS is a power of two that holds them. A block without rows has
    its first row at the end or beyond it.
    """
    others = tl.arange(0, EXPERTS)
    firsts = tl.load(offsets_ptr + others, mask=others < experts, other=0) // rows + others
    # One load and one sum take less time than the loads of a binary search, which wait for another.
    expert = tl.sum(((firsts <= block) & (others < experts)).to(tl.int32)) - 1
    start = tl.load(offsets_ptr + expert).to(tl.int64)
    first = start + (block - (start // rows + expert)) * rows
    return expert.to(tl.int64), first, tl.load(offsets_ptr + expert + 1).to(tl.int64)


@triton.jit
def blocks_of_expert(offsets_ptr, expert, rows):
    """Return the number of an expert's first block of rows, and how many it has."""
    start, end = tl.load(offsets_ptr + expert), tl.load(offsets_ptr + expert + 1)
    return start // rows + expert, (end - start + rows - 1) // rows


@triton.jit
def part_of_block(start, first, rows):
    """Return where the part lies of a block of an expert that has several; no two lie in one place.

    start, first: the first row of the expert and of the block. Of the blocks of such experts at
    most two begin within the same `rows` rows: an expert's last, and the next one's first.
    """
    return first // rows * 2 + (first == start)


@triton.jit
def rows_of_masks(rows_ptr, rows, end, ROWS: tl.constexpr):
    """Return the rows whose dropout bits these have: what rows_ptr has for them, if ROWS."""
    if ROWS:
        rows = tl.load(rows_ptr + rows, mask=rows < end, other=0)
    return rows


@triton.jit(do_not_specialize=["rows"])
def add_blocks_kernel(
    parts_ptr, offsets_ptr, out_ptr, width, rows, WHOLE: tl.constexpr, BLOCK_K: tl.constexpr
):
    """out [E,width] = the sum of each expert's parts, added in order.  Grid (⌈width/BLOCK_K⌉, E).

    parts [·,width], at the blocks' numbers. WHOLE: the sum of an expert whose rows are one block is
    in out already, and the other parts lie where part_of_block has it.
    """
    cols = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    expert = tl.program_id(1)
    first, blocks = blocks_of_expert(offsets_ptr, expert, rows)
    start = tl.load(offsets_ptr + expert)
    if WHOLE and blocks == 1:
        return
    acc = tl.zeros((BLOCK_K,), tl.float32)
    for block in range(blocks):
        part = first + block
        if WHOLE:
            part = part_of_block(start, start + block * rows, rows)
        where = part.to(tl.int64) * width + cols
        acc += tl.load(parts_ptr + where, mask=cols < width, other=0.0)
    tl.store(out_ptr + expert.to(tl.int64) * width + cols, acc, mask=cols < width)


def blocks(S: int, offsets: torch.Tensor, rows: int) -> int:
    """Return how many numbers the blocks of so many of S rows have, in use or not."""
    return S // rows + offsets.shape[0] - 1


def parts_held(S: int, rows: int) -> int:
    """Return how many places part_of_block may give for blocks of so many of S rows."""
    return 2 * (S // rows + 1)


def experts_held(offsets: torch.Tensor) -> int:
    """Return the power of two that holds all experts, at least a warp of them."""
    return max(32, triton.next_power_of_2(offsets.shape[0] - 1))


def factor_strides(factor: torch.Tensor) -> tuple[int, ...]:
    """Return the strides of a factor [E,·,·], or of one [·,·] that all experts share."""
    return factor.stride() if factor.dim() == 3 else (0, *factor.stride())


def add_blocks(
    parts: torch.Tensor, out: torch.Tensor, offsets: torch.Tensor, rows: int, whole: bool = False
) -> None:
    """Compute out = the sum of each expert's parts.  parts [·,...] -> out [E,...], fp32

    whole: the sum of an expert whose rows are one block is in out already, and the other parts lie
    where part_of_block has it, not at the blocks' numbers.
    """
    experts, tile = out.shape[0], configs.ADD_BLOCKS
    width = out.numel() // experts
    if width:
        launch.run(
            add_blocks_kernel, (configs.ceil_div(width, tile.BLOCK_K), experts), tile,
            parts, offsets, out, width, rows, WHOLE=whole,
        )  # fmt: skip
