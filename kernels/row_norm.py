"""row_norm: ‖W + sBA‖ per row or per column, reading W once and never writing BA.

A program computes the norms of a block of rows (or columns) of W. It loops along them, and computes
the tile of BA in registers. For a half-precision W, fp32 factors are multiplied in tf32, because
the rounding of W itself is coarser; for an fp32 W, as PRECISION says.
"""

import torch
import triton
import triton.language as tl

from lorafast.engine.kernels import configs, launch
from lorafast.engine.problem import Scaling


@triton.jit(do_not_specialize=["has_scale"])
def row_norm_kernel(
    W_ptr, A_ptr, B_ptr, scale_ptr, out_ptr, N, K, R,
    stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br, has_scale, scaling,
    BY_ROW: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out fp32 [N] = the norms of the rows of W + sBA, or [K] = those of its columns.

    Grid (⌈N/BLOCK_N⌉,) for rows (BY_ROW), (⌈K/BLOCK_K⌉,) for columns. has_scale: s is read from
    scale_ptr, and scaling is 1.
    """
    ranks = tl.arange(0, BLOCK_R)
    s = scaling * tl.load(scale_ptr, mask=has_scale != 0, other=1.0).to(tl.float32)
    block = tl.program_id(0)
    if BY_ROW:
        rows = (block * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
        squares = tl.zeros((BLOCK_N,), tl.float32)
        B = _factor(B_ptr, rows, ranks, N, R, stride_bn, stride_br) * s
        for start in range(0, K, BLOCK_K):
            cols = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
            A = tl.trans(_factor(A_ptr, cols, ranks, K, R, stride_ak, stride_ar))
            V = _weight(W_ptr, rows, cols, N, K, stride_wn, stride_wk) + tl.dot(
                B, A, input_precision=PRECISION
            )
            squares += tl.sum(V * V, axis=1)
        tl.store(out_ptr + rows, tl.sqrt(squares), mask=rows < N)
    else:
        cols = (block * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
        squares = tl.zeros((BLOCK_K,), tl.float32)
        A = tl.trans(_factor(A_ptr, cols, ranks, K, R, stride_ak, stride_ar))
        for start in range(0, N, BLOCK_N):
            rows = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
            B = _factor(B_ptr, rows, ranks, N, R, stride_bn, stride_br) * s
            V = _weight(W_ptr, rows, cols, N, K, stride_wn, stride_wk) + tl.dot(
                B, A, input_precision=PRECISION
            )
            squares += tl.sum(V * V, axis=0)
        tl.store(out_ptr + cols, tl.sqrt(squares), mask=cols < K)


@triton.jit
def _factor(ptr, offsets, ranks, length, R, stride_offset, stride_rank):
    """Return a factor's tile as fp32 [BLOCK, BLOCK_R], zero outside the factor."""
    inside = (offsets[:, None] < length) & (ranks[None, :] < R)
    return tl.load(
        ptr + offsets[:, None] * stride_offset + ranks[None, :] * stride_rank,
        mask=inside,
        other=0.0,
    ).to(tl.float32)


@triton.jit
def _weight(ptr, rows, cols, N, K, stride_n, stride_k):
    """Return a tile of W as fp32, zero outside W."""
    inside = (rows[:, None] < N) & (cols[None, :] < K)
    return tl.load(
        ptr + rows[:, None] * stride_n + cols[None, :] * stride_k, mask=inside, other=0.0
    ).to(tl.float32)


def row_norm(
    weight: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    scaling: Scaling = 1.0,
    axis: str = "out",
) -> torch.Tensor:
    """Return ‖W + sBA‖ in fp32, per row (axis="out", [N]) or per column (axis="in", [K])."""
    (N, K), R, by_row = weight.shape, A.shape[0], axis == "out"
    tile = configs.row_norm(R, weight.dtype)
    out = weight.new_empty(N if by_row else K, dtype=torch.float32)
    has_scale = isinstance(scaling, torch.Tensor)
    grid = configs.ceil_div(N, tile.BLOCK_N) if by_row else configs.ceil_div(K, tile.BLOCK_K)
    if grid:
        with launch.on(weight):
            row_norm_kernel[(grid,)](
                weight, A, B, scaling if has_scale else out, out, N, K, R,
                *weight.stride(), *A.stride(), *B.stride(),
                int(has_scale), 1.0 if has_scale else float(scaling), BY_ROW=by_row,
                PRECISION=launch.precision(weight) if weight.dtype == torch.float32 else "tf32",
                **tile.blocks("BLOCK_N", "BLOCK_K", "BLOCK_R"),
                num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
    return out
