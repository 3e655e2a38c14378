"""grad_project: dA = vᵀ drop(x), reading x once.

A program computes BLOCK_K columns of dA over one split of the rows. The columns are the tensor
cores' long axis, because R is short. Every split writes its own [R,K], and a second pass adds them
in order: no atomics.
"""

import torch
import triton
import triton.language as tl

from lorafast.engine.kernels import configs, launch
from lorafast.engine.kernels.expert_blocks import rows_of_masks
from lorafast.engine.kernels.philox import drop_tile
from lorafast.engine.precision import scaled_to_fp16
from lorafast.engine.problem import LowRankTerm


@triton.jit(do_not_specialize=["M", "steps"])
def grad_project_kernel(
    x_ptr, v_ptr, seed_ptr, out_ptr, M, K, R, stride_xm, stride_xk, stride_vm, stride_vr,
    groups, threshold, scale, steps, DROPS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out fp32 [splits,R,K] = vᵀ drop(x), per split of the rows.  Grid (⌈K/BLOCK_K⌉, splits)."""
    first_col = tl.program_id(0) * BLOCK_K
    cols = (first_col + tl.arange(0, BLOCK_K)).to(tl.int64)
    ranks = tl.arange(0, BLOCK_R)
    split = tl.program_id(1).to(tl.int64)
    acc = sum_of_rows(
        x_ptr, v_ptr, seed_ptr, seed_ptr, 0, split, M, K, R, first_col, cols, ranks,
        stride_xm, stride_xk, stride_vm, stride_vr, groups, threshold, steps,
        DROPS, False, PRECISION, BLOCK_M, BLOCK_K, BLOCK_R,
    )  # fmt: skip
    where = (split * R + ranks[:, None]) * K + cols[None, :]
    tl.store(
        out_ptr + where, tl.trans(acc) * scale, mask=(ranks[:, None] < R) & (cols[None, :] < K)
    )


@triton.jit
def sum_of_rows(
    x_ptr, v_ptr, seed_ptr, rows_ptr, start, split, end, K, R, first_col, cols, ranks,
    stride_xm, stride_xk, stride_vm, stride_vr, groups, threshold, steps,
    DROPS: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Return drop(x)ᵀ v, unscaled, over one split of the rows from `start` on, before `end`.

    A split is `steps` blocks of rows. cols: BLOCK_K columns of x, from first_col on.
    -> fp32 [BLOCK_K,BLOCK_R]. ROWS: the rows whose dropout bits they have are read from rows_ptr.
    """
    acc = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    if DROPS:
        seed = tl.load(seed_ptr)
    if ROWS:
        # Loads that feed no product are not pipelined: each step loads those of the next one.
        first_row = start + split * steps * BLOCK_M
        next_rows = rows_of_masks(rows_ptr, first_row + tl.arange(0, BLOCK_M), end, ROWS)
    for step in range(steps):
        first_row = start + (split * steps + step) * BLOCK_M
        rows = first_row + tl.arange(0, BLOCK_M)
        mask_rows = rows
        if ROWS:
            mask_rows = next_rows
            next_rows = rows_of_masks(rows_ptr, rows + BLOCK_M, end, ROWS)
        # Rows are compared in 32 bits, which takes half the instructions.
        within = tl.arange(0, BLOCK_M) < tl.minimum(end - first_row, BLOCK_M).to(tl.int32)
        inside = within[:, None] & (cols[None, :] < K)
        x = tl.load(
            x_ptr + rows[:, None] * stride_xm + cols[None, :] * stride_xk, mask=inside, other=0.0
        )
        if DROPS:
            x = drop_tile(x, seed, mask_rows, first_col // 8, groups, threshold, BLOCK_K // 8)
        inside = within[:, None] & (ranks[None, :] < R)
        v = tl.load(
            v_ptr + rows[:, None] * stride_vm + ranks[None, :] * stride_vr, mask=inside, other=0.0
        )
        acc = tl.dot(tl.trans(x), v.to(x.dtype), acc, input_precision=PRECISION)
    return acc


def grad_project(x2: torch.Tensor, term: LowRankTerm) -> torch.Tensor:
    """Return dA = vᵀ drop(x) in fp32.  x [M,K], v [M,R] -> [R,K]"""
    return sum_over_rows(x2, term.v, term.seed, term.p)


def sum_over_rows(
    x2: torch.Tensor, v: torch.Tensor, seed: torch.Tensor | None = None, p: float = 0.0
) -> torch.Tensor:
    """Return vᵀ drop(x) in fp32.  x [M,K], v [M,R], which may be fp32 beside fp16 -> [R,K]"""
    inverse = None
    if v.dtype != x2.dtype and x2.dtype == torch.float16:
        v, inverse = scaled_to_fp16(v)
    (M, K), R = x2.shape, v.shape[1]
    tile, splits, steps = configs.grad_project(M, K, R, x2.dtype, launch.arch_of(x2))
    shape = (splits, R, K) if splits > 1 else (R, K)
    out = launch.empty(x2, torch.float32, *shape)
    launch.run(
        grad_project_kernel, (configs.ceil_div(K, tile.BLOCK_K), splits), tile,
        x2, v, launch.seed_of(seed, x2), out, M, K, R, *x2.stride(), *v.stride(),
        *launch.dropout(K, p), steps,
        DROPS=p > 0, PRECISION=launch.precision(x2),
    )  # fmt: skip
    total = out if splits == 1 else out.sum(0)
    return total if inverse is None else total.mul_(inverse)
