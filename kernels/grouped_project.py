"""grouped_project: h = drop(x) A_eᵀ for rows x that are sorted by expert e, reading x once.

A program computes what one of project's does, for a block of rows of one expert.
"""

import torch
import triton
import triton.language as tl

from lorafast.engine import philox
from lorafast.engine.kernels import configs, launch
from lorafast.engine.kernels.expert_blocks import (
    blocks,
    expert_of_block,
    experts_held,
    factor_strides,
    rows_of_masks,
)
from lorafast.engine.kernels.project import finish, project_rows


@triton.jit(do_not_specialize=["S", "experts", "steps"])
def grouped_project_kernel(
    x_ptr, A_ptr, seed_ptr, offsets_ptr, rows_ptr, h_ptr, S, K, R, experts,
    stride_xm, stride_xk, stride_ae, stride_ar, stride_ak, groups, threshold, scale, steps,
    DROPS: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, EXPERTS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """h [S,R] = scale·drop(x) A_eᵀ.  Grid (S // BLOCK_M + experts, splits).

    PARTS: as in project_kernel. ROWS: the rows whose dropout bits they have are read from rows_ptr.
    """
    expert, first, end = expert_of_block(offsets_ptr, experts, tl.program_id(0), BLOCK_M, EXPERTS)
    if first >= end:
        return
    rows = first + tl.arange(0, BLOCK_M)
    mask_rows = rows_of_masks(rows_ptr, rows, end, ROWS)
    project_rows(
        x_ptr, A_ptr + expert * stride_ae, seed_ptr, h_ptr, rows, end, mask_rows, S, K, R,
        stride_xm, stride_xk, stride_ar, stride_ak, groups, threshold, scale, steps,
        DROPS, PARTS, PRECISION, BLOCK_M, BLOCK_K, BLOCK_R,
    )  # fmt: skip


def grouped_project(
    x: torch.Tensor,
    A: torch.Tensor,
    offsets: torch.Tensor,
    seed: torch.Tensor | None = None,
    p: float = 0.0,
    rows: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Return h = drop(x) A_eᵀ of each row's expert e, rounded to dtype (x's if not given).

    x [S,K], A [E,R,K] or one [R,K] of all experts, rows [S] -> [S,R]
    """
    (S, K), R, experts = x.shape, A.shape[-2], offsets.shape[0] - 1
    dtype, arch = dtype or x.dtype, launch.arch_of(x)
    tile, splits, steps = configs.grouped_project(S, experts, K, R, x.dtype, arch)
    in_parts = splits > 1
    h = launch.empty(x, *(torch.float32, splits, S, R) if in_parts else (dtype, S, R))
    if not S:
        return launch.empty(x, dtype, S, R)
    if A.dtype != x.dtype and configs.casts_first(tile, S // experts, K, experts * R, arch):
        A = A.to(x.dtype)
    launch.run(
        grouped_project_kernel, (blocks(S, offsets, tile.BLOCK_M), splits), tile,
        x, A, launch.seed_of(seed, x), offsets, launch.seed_of(rows, x), h, S, K, R, experts,
        *x.stride(), *factor_strides(A), *launch.dropout(K, p), steps,
        DROPS=p > 0, ROWS=p > 0 and rows is not None, PARTS=in_parts,
        EXPERTS=experts_held(offsets), PRECISION=launch.precision(x),
    )  # fmt: skip
    return finish(h, 0, R, None, philox.scale(p), dtype)[0] if in_parts else h
