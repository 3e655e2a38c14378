"""drop: out = (out if accumulate) + mask⊙x·scale, for whole activations and blocks of their rows.

It reads x once and makes the mask in registers. Where torch multiplies what is dropped, it serves
in place of the mask as a tensor.
"""

import torch
import triton
import triton.language as tl

from lorafast.engine.kernels import configs, launch
from lorafast.engine.kernels.philox import drop_tile


@triton.jit(do_not_specialize=["first_row", "M"])
def drop_kernel(
    x_ptr, seed_ptr, out_ptr, first_row, M, K, stride_xm, stride_xk, stride_om,
    groups, threshold, scale, ACCUMULATES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [M,K] = (out if ACCUMULATES) + mask⊙x·scale.  Grid (⌈M/BLOCK_M⌉, ⌈K/BLOCK_K⌉).

    The mask is that of the rows from first_row on.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    drop_rows(
        x_ptr, seed_ptr, out_ptr, rows, first_row, rows, M, K, stride_xm, stride_xk, stride_om,
        groups, threshold, scale, ACCUMULATES, BLOCK_K,
    )  # fmt: skip


@triton.jit
def drop_rows(
    x_ptr, seed_ptr, out_ptr, rows, first_row, mask_rows, M, K, stride_xm, stride_xk, stride_om,
    groups, threshold, scale, ACCUMULATES: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute a program's columns of some rows; their dropout bits are those of mask_rows, from
    first_row on.
    """
    cols = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (rows[:, None] < M) & (cols[None, :] < K)
    where = out_ptr + rows[:, None] * stride_om + cols[None, :]
    x = tl.load(
        x_ptr + rows[:, None] * stride_xm + cols[None, :].to(tl.int64) * stride_xk,
        mask=inside,
        other=0.0,
    )
    value = x.to(tl.float32) * scale
    if ACCUMULATES:
        before = tl.load(where, mask=inside, other=0.0).to(tl.float32)
    else:
        # Rounded before it is masked: numbers of 16 bits are masked in pairs.
        value = value.to(out_ptr.dtype.element_ty)
    value = drop_tile(
        value, tl.load(seed_ptr), first_row + mask_rows, tl.program_id(1) * (BLOCK_K // 8), groups,
        threshold, BLOCK_K // 8,
    )  # fmt: skip
    if ACCUMULATES:
        value = (before + value).to(out_ptr.dtype.element_ty)
    tl.store(where, value, mask=inside)


def drop(
    out: torch.Tensor,
    x2: torch.Tensor,
    seed: torch.Tensor,
    p: float,
    first_row: int = 0,
    scaled: bool = True,
    accumulate: bool = False,
) -> None:
    """Compute out = (out if accumulate) + mask⊙x·scale in place, rounded once.

    out, x2 [M,K]; out is dense along its rows, and may be uninitialised without accumulate. They
    are rows of a flattened activation from first_row on. scaled: False for a factor of 1.
    """
    M, K = out.shape
    if not out.numel():
        return
    tile = configs.DROP
    groups, threshold, scale = launch.dropout(K, p)
    launch.run(
        drop_kernel, (configs.ceil_div(M, tile.BLOCK_M), configs.ceil_div(K, tile.BLOCK_K)),
        tile, x2, seed, out, first_row, M, K, *x2.stride(), out.stride(0),
        groups, threshold, scale if scaled else 1.0,
        ACCUMULATES=accumulate,
    )  # fmt: skip
