"""masked_add: out = out + mask⊙(v A), the low-rank part of dx under dropout where the base product is torch's own.

The mask is remade in registers; out is read and written once, and rounded once.
"""

import torch
import triton
import triton.language as tl

from lorafast.engine import philox
from lorafast.engine.kernels import configs, launch
from lorafast.engine.kernels.philox import keep_tile
from lorafast.engine.problem import LowRankTerm


@triton.jit(do_not_specialize=["M", "started"])
def masked_add_kernel(
    v_ptr, A_ptr, seed_ptr, out_ptr, M, K, R, stride_vm, stride_vr, stride_ar, stride_ak, groups, threshold, scale, started,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Grid (⌈M/BLOCK_M⌉, ⌈K/BLOCK_K⌉). Without `started` out is written without being read."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for start in range(0, R, BLOCK_R):
        ranks = start + tl.arange(0, BLOCK_R)
        inside = (rows[:, None] < M) & (ranks[None, :] < R)
        v = tl.load(
            v_ptr + rows[:, None] * stride_vm + ranks[None, :] * stride_vr, mask=inside, other=0.0
        )
        inside = (ranks[:, None] < R) & (cols[None, :] < K)
        A = tl.load(
            A_ptr + ranks[:, None] * stride_ar + cols[None, :] * stride_ak, mask=inside, other=0.0
        )
        acc = tl.dot(v, A.to(v.dtype), acc, input_precision=PRECISION)
    kept = keep_tile(
        tl.load(seed_ptr), rows, tl.program_id(1) * BLOCK_K // 8, groups, threshold, BLOCK_K // 8
    )
    where = out_ptr + rows[:, None] * K + cols[None, :]
    inside = (rows[:, None] < M) & (cols[None, :] < K)
    before = tl.load(where, mask=(inside & (started != 0)) != 0, other=0.0).to(tl.float32)
    tl.store(
        where, (before + tl.where(kept, acc * scale, 0.0)).to(out_ptr.dtype.element_ty), mask=inside
    )


def masked_add(out: torch.Tensor, low: LowRankTerm, started: bool) -> None:
    """out = (out if started) + mask⊙(v A), in place.  out [M,K] contiguous, low.v [M,R], low.A [R,K]."""
    (M, K), R = out.shape, low.A.shape[0]
    tile = configs.masked_add(out.dtype)
    if out.numel():
        with launch.on(out):
            masked_add_kernel[configs.ceil_div(M, tile.BLOCK_M), configs.ceil_div(K, tile.BLOCK_K)](
                low.v, low.A, low.seed, out, M, K, R, *low.v.stride(), *low.A.stride(), launch.groups(K), philox.threshold(low.p),
                philox.scale(low.p), int(started), PRECISION=launch.precision(out),
                **tile.blocks("BLOCK_M", "BLOCK_K"), num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
