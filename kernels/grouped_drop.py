"""grouped_drop: mask⊙x·scale with the dropout bits of other rows, and gain_e⊙x of rows' experts e.

Both serve where torch's grouped product multiplies the result.
"""

import torch
import triton
import triton.language as tl

from lorafast.engine.kernels import configs, launch
from lorafast.engine.kernels.drop import drop_rows
from lorafast.engine.kernels.expert_blocks import blocks, expert_of_block, experts_held


@triton.jit(do_not_specialize=["S"])
def grouped_drop_kernel(
    x_ptr, seed_ptr, rows_ptr, out_ptr, S, K, stride_xm, stride_xk, stride_om,
    groups, threshold, scale, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [S,K] = mask⊙x·scale, the masks those of rows [S].  Grid (⌈S/BLOCK_M⌉, ⌈K/BLOCK_K⌉)."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_rows = tl.load(rows_ptr + rows, mask=rows < S, other=0)
    drop_rows(
        x_ptr, seed_ptr, out_ptr, rows, 0, mask_rows, S, K, stride_xm, stride_xk, stride_om,
        groups, threshold, scale, False, BLOCK_K,
    )  # fmt: skip


@triton.jit(do_not_specialize=["experts"])
def grouped_gain_kernel(
    x_ptr, gain_ptr, offsets_ptr, out_ptr, K, experts, stride_xm, stride_xk,
    EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [S,K] = gain_e⊙x, gain [E,K].  Grid (S // BLOCK_M + experts, ⌈K/BLOCK_K⌉)."""
    expert, first, end = expert_of_block(offsets_ptr, experts, tl.program_id(0), BLOCK_M, EXPERTS)
    if first >= end:
        return
    rows = first + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (rows[:, None] < end) & (cols[None, :] < K)
    x = tl.load(
        x_ptr + rows[:, None] * stride_xm + cols[None, :] * stride_xk, mask=inside, other=0.0
    )
    gain = tl.load(gain_ptr + expert * K + cols, mask=cols < K, other=0.0).to(tl.float32)
    value = (x.to(tl.float32) * gain[None, :]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + rows[:, None] * K + cols[None, :], value, mask=inside)


def grouped_drop(x: torch.Tensor, seed: torch.Tensor, p: float, rows: torch.Tensor) -> torch.Tensor:
    """Return mask⊙x·scale, rounded once, with the masks of rows [S].  x [S,K]"""
    (S, K), out, tile = x.shape, launch.empty(x, x.dtype, *x.shape), configs.DROP
    if out.numel():
        launch.run(
            grouped_drop_kernel,
            (configs.ceil_div(S, tile.BLOCK_M), configs.ceil_div(K, tile.BLOCK_K)), tile,
            x, seed, rows, out, S, K, *x.stride(), out.stride(0), *launch.dropout(K, p),
        )  # fmt: skip
    return out


def grouped_gain(x: torch.Tensor, gain: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Return gain_e⊙x of each row's expert e, rounded once.  x [S,K], gain [E,K]"""
    (S, K), out, tile = x.shape, launch.empty(x, x.dtype, *x.shape), configs.DROP
    if out.numel():
        launch.run(
            grouped_gain_kernel,
            (blocks(S, offsets, tile.BLOCK_M), configs.ceil_div(K, tile.BLOCK_K)), tile,
            x, gain.contiguous(), offsets, out, K, offsets.shape[0] - 1, *x.stride(),
            EXPERTS=experts_held(offsets),
        )  # fmt: skip
    return out
