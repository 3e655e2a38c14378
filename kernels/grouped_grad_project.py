"""grouped_grad_project: dA_e = vᵀ drop(x) over the rows of each expert e, reading x once.

A program computes BLOCK_K columns over one block of an expert's rows, which is as long as a split
of grad_project's rows: what fills a GPU if all rows are one expert's. An expert whose rows are one
block is done then; the parts of a longer one are added in order in a second pass, without atomics,
which also writes the zeros of experts without rows.
"""

import torch
import triton
import triton.language as tl

from lorafast.engine.kernels import configs, launch
from lorafast.engine.kernels.expert_blocks import (
    add_blocks,
    blocks,
    expert_of_block,
    experts_held,
    part_of_block,
    parts_held,
)
from lorafast.engine.kernels.grad_project import sum_of_rows
from lorafast.engine.precision import scaled_to_fp16


@triton.jit(do_not_specialize=["experts", "steps"])
def grouped_grad_project_kernel(
    x_ptr, v_ptr, seed_ptr, offsets_ptr, rows_ptr, out_ptr, parts_ptr, K, R, experts,
    stride_xm, stride_xk, stride_vm, stride_vr, groups, threshold, scale, steps,
    DROPS: tl.constexpr, ROWS: tl.constexpr, EXPERTS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out fp32 [E,R,K] = vᵀ drop(x) of experts with one block of rows, else parts [·,R,K].

    Grid (⌈K/BLOCK_K⌉, blocks); a block has steps·BLOCK_M rows. part_of_block has the parts' places.
    """
    block, block_rows = tl.program_id(1), steps * BLOCK_M
    expert, first, end = expert_of_block(offsets_ptr, experts, block, block_rows, EXPERTS)
    if first >= end:
        return
    first_col = tl.program_id(0) * BLOCK_K
    cols = (first_col + tl.arange(0, BLOCK_K)).to(tl.int64)
    ranks = tl.arange(0, BLOCK_R)
    start = tl.load(offsets_ptr + expert).to(tl.int64)
    # Chosen before the loop, through which only one address has to be kept then.
    out_ptr = tl.where(
        end - start <= block_rows,
        out_ptr + expert * R * K,
        parts_ptr + part_of_block(start, first, block_rows) * R * K,
    )
    own_steps = tl.minimum((end - first + BLOCK_M - 1) // BLOCK_M, steps).to(tl.int32)
    acc = sum_of_rows(
        x_ptr, v_ptr, seed_ptr, rows_ptr, first, 0, end, K, R, first_col, cols, ranks,
        stride_xm, stride_xk, stride_vm, stride_vr, groups, threshold, own_steps,
        DROPS, ROWS, PRECISION, BLOCK_M, BLOCK_K, BLOCK_R,
    )  # fmt: skip
    where = ranks[:, None] * K + cols[None, :]
    inside = (ranks[:, None] < R) & (cols[None, :] < K)
    tl.store(out_ptr + where, tl.trans(acc) * scale, mask=inside)


def grouped_grad_project(
    x: torch.Tensor,
    v: torch.Tensor,
    offsets: torch.Tensor,
    seed: torch.Tensor | None = None,
    p: float = 0.0,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return vᵀ drop(x) over the rows of each expert, in fp32.

    x [S,K], v [S,R], which may be fp32 beside fp16, rows [S] -> [E,R,K]
    """
    inverse = None
    if v.dtype != x.dtype and x.dtype == torch.float16:
        v, inverse = scaled_to_fp16(v)
    (S, K), R, experts = x.shape, v.shape[1], offsets.shape[0] - 1
    tile, _, steps = configs.grad_project(S, K, R, x.dtype, launch.arch_of(x))
    block_rows = max(1, steps) * tile.BLOCK_M
    numbers = blocks(S, offsets, block_rows)
    out = launch.empty(x, torch.float32, experts, R, K)
    parts = launch.empty(x, torch.float32, parts_held(S, block_rows), R, K)
    if S and K:
        launch.run(
            grouped_grad_project_kernel, (configs.ceil_div(K, tile.BLOCK_K), numbers), tile,
            x, v, launch.seed_of(seed, x), offsets, launch.seed_of(rows, x), out, parts, K, R,
            experts, *x.stride(), *v.stride(), *launch.dropout(K, p), steps,
            DROPS=p > 0, ROWS=p > 0 and rows is not None, EXPERTS=experts_held(offsets),
            PRECISION=launch.precision(x),
        )  # fmt: skip
    add_blocks(parts, out, offsets, block_rows, whole=True)
    return out if inverse is None else out.mul_(inverse)
