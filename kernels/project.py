"""project: h = drop(x) Aᵀ and h' = core(h), x read once.

A program owns BLOCK_M rows and all R ranks, and walks its share of K; the mask is remade in registers. Few rows leave most of a
GPU idle, so K may be split: then every split writes its fp32 sums, and `finish_kernel` adds them in order. No atomics.
"""

import triton
import triton.language as tl

from lorafast.kernels.philox import keep_tile


@triton.jit
def project_kernel(
    x_ptr, A_ptr, core_ptr, seed_ptr, h_ptr, mixed_ptr, M, K, R, stride_xm, stride_xk, stride_ar, stride_ak, stride_ci, stride_cj,
    groups, threshold, scale, steps,
    DROPS: tl.constexpr, CORE: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Grid (⌈M/BLOCK_M⌉, splits). SPLIT: h_ptr takes fp32 sums [splits,M,R], and finish_kernel does the rest.

    How many splits there are changes with M and is no part of what is compiled: every length of a batch would compile anew.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.arange(0, BLOCK_R)
    first = tl.program_id(1) * steps * BLOCK_K
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    if DROPS:
        seed = tl.load(seed_ptr)
    for step in range(steps):
        start = first + step * BLOCK_K
        cols = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        inside = (rows[:, None] < M) & (cols[None, :] < K)
        x = tl.load(x_ptr + rows[:, None] * stride_xm + cols[None, :] * stride_xk, mask=inside, other=0.0)
        if DROPS:
            kept = keep_tile(seed, rows, start // 8, groups, threshold, BLOCK_K // 8)
            x = tl.where(kept, x, 0.0).to(x.dtype)
        inside = (ranks[:, None] < R) & (cols[None, :] < K)
        A = tl.load(A_ptr + ranks[:, None] * stride_ar + cols[None, :] * stride_ak, mask=inside, other=0.0)
        acc = tl.dot(x, tl.trans(A.to(x.dtype)), acc, input_precision=PRECISION)
    if SPLIT:
        where = (tl.program_id(1).to(tl.int64) * M + rows[:, None]) * R + ranks[None, :]
        tl.store(h_ptr + where, acc, mask=(rows[:, None] < M) & (ranks[None, :] < R))
    else:
        _finish(acc * scale, core_ptr, h_ptr, mixed_ptr, rows, ranks, M, R, stride_ci, stride_cj, CORE, PRECISION)


@triton.jit
def finish_kernel(
    sums_ptr, core_ptr, h_ptr, mixed_ptr, M, R, stride_ci, stride_cj, scale, splits,
    CORE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Grid (⌈M/BLOCK_M⌉): the splits' sums added in order, then what project_kernel does with its own."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.arange(0, BLOCK_R)
    inside = (rows[:, None] < M) & (ranks[None, :] < R)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for split in range(splits):
        acc += tl.load(sums_ptr + (split * M + rows[:, None]) * R + ranks[None, :], mask=inside, other=0.0)
    _finish(acc * scale, core_ptr, h_ptr, mixed_ptr, rows, ranks, M, R, stride_ci, stride_cj, CORE, PRECISION)


@triton.jit
def _finish(
    acc, core_ptr, h_ptr, mixed_ptr, rows, ranks, M, R, stride_ci, stride_cj, CORE: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """h rounded once, and h' from the rounded h. CORE: the number of the core's dimensions, 0 for none."""
    inside = (rows[:, None] < M) & (ranks[None, :] < R)
    where = rows[:, None] * R + ranks[None, :]
    h = acc.to(h_ptr.dtype.element_ty)
    tl.store(h_ptr + where, h, mask=inside)
    if CORE == 1:
        core = tl.load(core_ptr + ranks * stride_ci, mask=ranks < R, other=0.0).to(h.dtype)
        tl.store(mixed_ptr + where, h * core[None, :], mask=inside)
    if CORE == 2:
        # The core as [j, i], so that h' = h coreᵀ is a plain product.
        square = (ranks[:, None] < R) & (ranks[None, :] < R)
        core = tl.load(core_ptr + ranks[None, :] * stride_ci + ranks[:, None] * stride_cj, mask=square, other=0.0).to(h.dtype)
        tl.store(mixed_ptr + where, tl.dot(h, core, input_precision=PRECISION).to(h.dtype), mask=inside)
