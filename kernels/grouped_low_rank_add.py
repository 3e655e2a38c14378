"""grouped_low_rank_add: out = gain_e⊙(out + mask⊙(v A_e)) + bias_e for rows sorted by expert e.

It adds the low-rank part of y, and that of dx, to what torch's grouped product has made. out is
read and written once, and rounded once; the mask is recomputed in registers.
"""

import torch
import triton
import triton.language as tl

from lorafast.engine.kernels import configs, launch
from lorafast.engine.kernels.expert_blocks import (
    blocks,
    expert_of_block,
    experts_held,
    factor_strides,
    rows_of_masks,
)
from lorafast.engine.kernels.low_rank_add import low_rank_tile
from lorafast.engine.kernels.philox import drop_tile


@triton.jit(do_not_specialize=["experts", "has_gain", "has_bias"])
def grouped_low_rank_add_kernel(
    v_ptr, A_ptr, seed_ptr, offsets_ptr, rows_ptr, gain_ptr, bias_ptr, inner_ptr, out_ptr,
    K, R, experts, stride_vm, stride_vr, stride_ae, stride_ar, stride_ak, stride_om, stride_im,
    groups, threshold, scale, has_gain, has_bias,
    DROPS: tl.constexpr, ROWS: tl.constexpr, INNER: tl.constexpr, EXPERTS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out [S,K] = gain_e⊙(out + mask⊙(v A_e)·scale) + bias_e.

    Grid (S // BLOCK_M + experts, ⌈K/BLOCK_K⌉). gain, bias [E,K]. INNER: the sum before gain and
    bias goes to inner [S,K]. ROWS: the rows whose dropout bits they have are read from rows_ptr.
    """
    expert, first, end = expert_of_block(offsets_ptr, experts, tl.program_id(0), BLOCK_M, EXPERTS)
    if first >= end:
        return
    rows = first + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    where = out_ptr + rows[:, None] * stride_om + cols[None, :]
    inside = (rows[:, None] < end) & (cols[None, :] < K)
    # Loaded first, so that it arrives while the product and the mask are computed.
    before = tl.load(where, mask=inside, other=0.0)
    acc = low_rank_tile(
        v_ptr, A_ptr + expert * stride_ae, rows, cols, end, K, R,
        stride_vm, stride_vr, stride_ar, stride_ak, PRECISION, BLOCK_M, BLOCK_K, BLOCK_R,
    )  # fmt: skip
    value = acc * scale
    if DROPS:
        value = drop_tile(
            value, tl.load(seed_ptr), rows_of_masks(rows_ptr, rows, end, ROWS),
            tl.program_id(1) * (BLOCK_K // 8), groups, threshold, BLOCK_K // 8,
        )  # fmt: skip
    value += before.to(tl.float32)
    if INNER:
        tl.store(
            inner_ptr + rows[:, None] * stride_im + cols[None, :],
            value.to(inner_ptr.dtype.element_ty),
            mask=inside,
        )
    vector = expert * K + cols
    value *= tl.load(gain_ptr + vector, mask=((cols < K) & (has_gain != 0)) != 0, other=1.0).to(
        tl.float32
    )[None, :]
    value += tl.load(bias_ptr + vector, mask=((cols < K) & (has_bias != 0)) != 0, other=0.0).to(
        tl.float32
    )[None, :]
    tl.store(where, value.to(out_ptr.dtype.element_ty), mask=inside)


def grouped_low_rank_add(
    out: torch.Tensor,
    v: torch.Tensor,
    A: torch.Tensor,
    offsets: torch.Tensor,
    seed: torch.Tensor | None = None,
    p: float = 0.0,
    rows: torch.Tensor | None = None,
    gain: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    inner: torch.Tensor | None = None,
) -> None:
    """Compute out = gain_e⊙(out + mask⊙(v A_e)) + bias_e in place, for each row's expert e.

    out [S,K], dense along its rows, v [S,R], A [E,R,K] or one [R,K] of all experts, rows [S], gain
    and bias [E,K]. The sum before gain and bias goes to inner [S,K], dense along its rows.
    """
    (S, K), R = out.shape, A.shape[-2]
    if not out.numel():
        return
    tile = configs.low_rank_add(out.dtype)
    # out stands in for an absent tensor, whose argument is not read.
    vectors = [out if one is None else one.contiguous() for one in (gain, bias)]
    inner_out = out if inner is None else inner
    launch.run(
        grouped_low_rank_add_kernel,
        (blocks(S, offsets, tile.BLOCK_M), configs.ceil_div(K, tile.BLOCK_K)), tile,
        v, A, launch.seed_of(seed, out), offsets, launch.seed_of(rows, out), *vectors,
        inner_out, out, K, R, offsets.shape[0] - 1, *v.stride(), *factor_strides(A),
        out.stride(0), inner_out.stride(0), *launch.dropout(K, p),
        int(gain is not None), int(bias is not None),
        DROPS=p > 0, ROWS=p > 0 and rows is not None, INNER=inner is not None,
        EXPERTS=experts_held(offsets), PRECISION=launch.precision(out),
    )  # fmt: skip
