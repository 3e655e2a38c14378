"""row_norm: ‖W + sBA‖ per row or per column, reading W once and never writing BA.

A program sums the squares of a block of rows (or columns) of W over one split of their length. It
loops along them, computes the tile of BA in registers, and loads the next tile of W before that.
The splits are added in order, without atomics. For a half-precision W, fp32 factors are multiplied
in tf32, because the rounding of W itself is coarser; for an fp32 W, as PRECISION says. Tensor cores
ignore the low 13 bits of an operand in tf32, which would make every product too small: factors are
rounded first, the one that changes along the loop by a launch of its own if it has many ranks.
"""

import torch
import triton
import triton.language as tl

from lorafast.engine.kernels import configs, launch
from lorafast.engine.kernels.scale_cast import rounded_to_tf32, scale_cast
from lorafast.engine.problem import Scaling


@triton.jit(do_not_specialize=["has_scale", "steps"])
def row_norm_kernel(
    W_ptr, A_ptr, B_ptr, scale_ptr, out_ptr, N, K, R,
    stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br, has_scale, scaling, steps,
    BY_ROW: tl.constexpr, ROUNDED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out fp32 [splits,N] = the sums of squares of the rows of W + sBA, [splits,K] of its columns.

    Grid (⌈N/BLOCK_N⌉, splits) for rows (BY_ROW), (⌈K/BLOCK_K⌉, splits) for columns. has_scale: s is
    read from scale_ptr, and scaling is 1. ROUNDED: the factor that changes along the loop has been
    rounded to what PRECISION multiplies, and multiplied by s.
    """
    ranks = tl.arange(0, BLOCK_R)
    s = scaling * tl.load(scale_ptr, mask=has_scale != 0, other=1.0).to(tl.float32)
    block, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    if BY_ROW:
        first_row, first_col, down, right = block * BLOCK_N, split * steps * BLOCK_K, 0, BLOCK_K
    else:
        first_row, first_col, down, right = split * steps * BLOCK_N, block * BLOCK_K, BLOCK_N, 0
    rows, cols = first_row + tl.arange(0, BLOCK_N), first_col + tl.arange(0, BLOCK_K)
    # The factor that does not change along the loop.
    if BY_ROW:
        B = _operand(_factor(B_ptr, rows, ranks, N, R, stride_bn, stride_br) * s, PRECISION)
    else:
        A = _operand(_factor(A_ptr, cols, ranks, K, R, stride_ak, stride_ar), PRECISION)
    squares = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    next_W = _weight(W_ptr, rows, cols, N, K, stride_wn, stride_wk)
    for _ in range(steps):
        # W feeds no product, and would be loaded when it is used.
        W = next_W
        next_W = _weight(W_ptr, rows + down, cols + right, N, K, stride_wn, stride_wk)
        if BY_ROW:
            A = _factor(A_ptr, cols, ranks, K, R, stride_ak, stride_ar)
            if not ROUNDED:
                A = _operand(A, PRECISION)
        else:
            B = _factor(B_ptr, rows, ranks, N, R, stride_bn, stride_br)
            if not ROUNDED:
                B = _operand(B * s, PRECISION)
        V = W.to(tl.float32) + tl.dot(tl.trans(B), A, input_precision=PRECISION)
        squares += V * V
        rows += down
        cols += right
    if BY_ROW:
        rows = first_row + tl.arange(0, BLOCK_N)
        tl.store(out_ptr + split * N + rows, tl.sum(squares, axis=1), mask=rows < N)
    else:
        cols = first_col + tl.arange(0, BLOCK_K)
        tl.store(out_ptr + split * K + cols, tl.sum(squares, axis=0), mask=cols < K)


@triton.jit
def _factor(ptr, offsets, ranks, length, R, stride_offset, stride_rank):
    """Return a factor's tile as fp32 [BLOCK_R, BLOCK], zero outside the factor."""
    inside = (offsets[None, :] < length) & (ranks[:, None] < R)
    return tl.load(
        ptr + offsets[None, :] * stride_offset + ranks[:, None] * stride_rank,
        mask=inside,
        other=0.0,
    ).to(tl.float32)


@triton.jit
def _operand(factor, PRECISION: tl.constexpr):
    """Return a factor rounded to what PRECISION multiplies."""
    if PRECISION == "tf32":
        factor = rounded_to_tf32(factor)
    return factor


@triton.jit
def _weight(ptr, rows, cols, N, K, stride_n, stride_k):
    """Return a tile of W, zero outside W."""
    inside = (rows[:, None] < N) & (cols[None, :] < K)
    return tl.load(
        ptr + rows[:, None] * stride_n + cols[None, :] * stride_k, mask=inside, other=0.0
    )


def row_norm(
    weight: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    scaling: Scaling = 1.0,
    axis: str = "out",
) -> torch.Tensor:
    """Return ‖W + sBA‖ in fp32, per row (axis="out", [N]) or per column (axis="in", [K])."""
    (N, K), R, by_row = weight.shape, A.shape[0], axis == "out"
    tile, splits, steps = configs.row_norm(N, K, R, weight.dtype, launch.arch_of(weight), by_row)
    length = N if by_row else K
    squares = launch.empty(weight, torch.float32, splits, length)
    full = weight.dtype == torch.float32
    precision = launch.precision(weight) if full else launch.tf32_if_any(weight)
    rounded = precision == "tf32" and configs.BLOCKS_R[0] < R
    if rounded and by_row:
        A = scale_cast(A, torch.float32, tf32=True)
    elif rounded:
        B, scaling = scale_cast(B, torch.float32, scaling, tf32=True), 1.0
    has_scale = isinstance(scaling, torch.Tensor)
    if length:
        grid = configs.ceil_div(length, tile.BLOCK_N if by_row else tile.BLOCK_K), splits
        launch.run(
            row_norm_kernel, grid, tile,
            weight, A, B, scaling if has_scale else squares, squares, N, K, R,
            *weight.stride(), *A.stride(), *B.stride(),
            int(has_scale), 1.0 if has_scale else float(scaling), steps,
            BY_ROW=by_row, ROUNDED=rounded, PRECISION=precision,
        )  # fmt: skip
    return squares.sum(0).sqrt_()
