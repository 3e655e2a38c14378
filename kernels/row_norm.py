"""row_norm: ‖W + sBA‖ per row or per column, W read once, BA never written.

A program owns BLOCK rows (or columns) of W and walks along them; the tile of BA is a product in registers. Factors of fp32 are
multiplied in tf32 beside a half-precision W, whose own rounding is coarser; beside an fp32 W as PRECISION says.
"""

import torch
import triton
import triton.language as tl

from lorafast.engine.kernels import configs, launch
from lorafast.engine.problem import Scaling


@triton.jit(do_not_specialize=["scaled"])
def row_norm_kernel(
    W_ptr, A_ptr, B_ptr, scale_ptr, out_ptr, N, K, R, stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br,
    scaled, scaling, BY_ROW: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Grid (⌈N/BLOCK_N⌉) for rows, (⌈K/BLOCK_K⌉) for columns -> out fp32 [N] or [K]. scaled: s is at scale_ptr."""
    ranks = tl.arange(0, BLOCK_R)
    s = scaling * tl.load(scale_ptr, mask=scaled != 0, other=1.0).to(tl.float32)
    own = tl.program_id(0)
    if BY_ROW:
        rows = (own * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
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
        cols = (own * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
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
def _factor(ptr, places, ranks, count, R, stride_place, stride_rank):
    """A factor's tile as fp32 [BLOCK, BLOCK_R], zero beyond its ends."""
    inside = (places[:, None] < count) & (ranks[None, :] < R)
    return tl.load(
        ptr + places[:, None] * stride_place + ranks[None, :] * stride_rank, mask=inside, other=0.0
    ).to(tl.float32)


@triton.jit
def _weight(ptr, rows, cols, N, K, stride_n, stride_k):
    """A tile of W as fp32, zero beyond its ends."""
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
    """‖W + sBA‖ per row (axis="out", [N]) or per column (axis="in", [K]), in fp32."""
    (N, K), R, by_row = weight.shape, A.shape[0], axis == "out"
    tile = configs.row_norm(R, weight.dtype)
    out = weight.new_empty(N if by_row else K, dtype=torch.float32)
    scaled = isinstance(scaling, torch.Tensor)
    grid = configs.ceil_div(N, tile.BLOCK_N) if by_row else configs.ceil_div(K, tile.BLOCK_K)
    if grid:
        with launch.on(weight):
            row_norm_kernel[(grid,)](
                weight, A, B, scaling if scaled else out, out, N, K, R, *weight.stride(), *A.stride(), *B.stride(),
                int(scaled), 1.0 if scaled else float(scaling), BY_ROW=by_row,
                PRECISION=launch.precision(weight) if weight.dtype == torch.float32 else "tf32",
                **tile.blocks("BLOCK_N", "BLOCK_K"), num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
    return out
