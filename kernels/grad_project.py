"""grad_project: dA = vᵀ drop(x), x read once.

A program owns BLOCK_K columns of x, which lie on the tensor cores' long axis (R is short), and walks its share of the rows. Every
split of the rows writes its own [R,K]; they are added in order afterwards. No atomics.
"""

import triton
import triton.language as tl

from lorafast.kernels.philox import keep_tile


@triton.jit
def grad_project_kernel(
    x_ptr, v_ptr, seed_ptr, out_ptr, M, K, R, stride_xm, stride_xk, stride_vm, stride_vr, groups, threshold, scale, steps,
    DROPS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Grid (⌈K/BLOCK_K⌉, splits) -> out fp32 [splits,R,K]."""
    first_col = tl.program_id(0) * BLOCK_K
    cols = (first_col + tl.arange(0, BLOCK_K)).to(tl.int64)
    ranks = tl.arange(0, BLOCK_R)
    split = tl.program_id(1).to(tl.int64)
    acc = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    if DROPS:
        seed = tl.load(seed_ptr)
    for step in range(steps):
        rows = (split * steps + step) * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = (rows[:, None] < M) & (cols[None, :] < K)
        x = tl.load(x_ptr + rows[:, None] * stride_xm + cols[None, :] * stride_xk, mask=inside, other=0.0)
        if DROPS:
            kept = keep_tile(seed, rows, first_col // 8, groups, threshold, BLOCK_K // 8)
            x = tl.where(kept, x, 0.0).to(x.dtype)
        inside = (rows[:, None] < M) & (ranks[None, :] < R)
        v = tl.load(v_ptr + rows[:, None] * stride_vm + ranks[None, :] * stride_vr, mask=inside, other=0.0)
        acc = tl.dot(tl.trans(x), v.to(x.dtype), acc, input_precision=PRECISION)
    where = (split * R + ranks[:, None]) * K + cols[None, :]
    tl.store(out_ptr + where, tl.trans(acc) * scale, mask=(ranks[:, None] < R) & (cols[None, :] < K))
