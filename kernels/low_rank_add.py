"""low_rank_add: out = out + mask⊙(v A), the low-rank part of dx under dropout.

It serves routes on which torch multiplies the base. The mask is recomputed in registers; out is
read and written once, and rounded once.
"""

import torch
import triton
import triton.language as tl

from lorafast.engine.kernels import configs, launch
from lorafast.engine.kernels.philox import drop_tile
from lorafast.engine.problem import LowRankTerm


@triton.jit(do_not_specialize=["M"])
def low_rank_add_kernel(
    v_ptr, A_ptr, seed_ptr, out_ptr, M, K, R, stride_vm, stride_vr, stride_ar, stride_ak,
    groups, threshold, scale, ACCUMULATES: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out [M,K] = (out if ACCUMULATES) + mask⊙(v A).  Grid (⌈M/BLOCK_M⌉, ⌈K/BLOCK_K⌉)."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    where = out_ptr + rows[:, None] * K + cols[None, :]
    inside = (rows[:, None] < M) & (cols[None, :] < K)
    if ACCUMULATES:
        # Loaded first, so that it arrives while the product and the mask are computed.
        before = tl.load(where, mask=inside, other=0.0)
    acc = low_rank_tile(
        v_ptr, A_ptr, rows, cols, M, K, R, stride_vm, stride_vr, stride_ar, stride_ak,
        PRECISION, BLOCK_M, BLOCK_K, BLOCK_R,
    )  # fmt: skip
    value = acc * scale
    if not ACCUMULATES:
        # Rounded before it is masked: numbers of 16 bits are masked in pairs.
        value = value.to(out_ptr.dtype.element_ty)
    value = drop_tile(
        value, tl.load(seed_ptr), rows, tl.program_id(1) * (BLOCK_K // 8), groups, threshold,
        BLOCK_K // 8,
    )  # fmt: skip
    if ACCUMULATES:
        value = (before.to(tl.float32) + value).to(out_ptr.dtype.element_ty)
    tl.store(where, value, mask=inside)


@triton.jit
def low_rank_tile(
    v_ptr, A_ptr, rows, cols, end, K, R, stride_vm, stride_vr, stride_ar, stride_ak,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Return v A of the rows before `end` and of some columns, fp32 [BLOCK_M,BLOCK_K]."""
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for start in range(0, R, BLOCK_R):
        ranks = start + tl.arange(0, BLOCK_R)
        v = tl.load(
            v_ptr + rows[:, None] * stride_vm + ranks[None, :] * stride_vr,
            mask=(rows[:, None] < end) & (ranks[None, :] < R),
            other=0.0,
        )
        A = tl.load(
            A_ptr + ranks[:, None] * stride_ar + cols[None, :] * stride_ak,
            mask=(ranks[:, None] < R) & (cols[None, :] < K),
            other=0.0,
        )
        acc = tl.dot(v, A.to(v.dtype), acc, input_precision=PRECISION)
    return acc


def low_rank_add(out: torch.Tensor, term: LowRankTerm, accumulate: bool) -> None:
    """Compute out = (out if accumulate) + mask⊙(v A) in place.

    out [M,K] contiguous, term.v [M,R], term.A [R,K]. Without accumulate out may be uninitialised.
    """
    (M, K), R = out.shape, term.A.shape[0]
    if not out.numel():
        return
    tile = configs.low_rank_add(out.dtype)
    launch.run(
        low_rank_add_kernel,
        (configs.ceil_div(M, tile.BLOCK_M), configs.ceil_div(K, tile.BLOCK_K)), tile,
        term.v, term.A, term.seed, out, M, K, R, *term.v.stride(), *term.A.stride(),
        *launch.dropout(K, term.p),
        ACCUMULATES=accumulate, PRECISION=launch.precision(out),
    )  # fmt: skip
