"""project: h = drop(x) Aᵀ and h' = core(h), x read once.

A program owns BLOCK_M rows and all R ranks, and walks its share of K; the mask is remade in registers. Few rows leave most of a
GPU idle, so K may be split: then every split writes its fp32 sums, and `finish_kernel` adds them in order. No atomics.

Several ways down that drop alike, as siblings and adapters without dropout do, are one stack of A: x is read once for all of them.
"""

import torch
import triton
import triton.language as tl

from lorafast import philox
from lorafast.kernels import configs, launch
from lorafast.kernels.philox import keep_tile
from lorafast.problem import Down
from lorafast.reference import mix


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
    sums_ptr, core_ptr, h_ptr, mixed_ptr, M, R, width, stride_ci, stride_cj, scale, splits,
    CORE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Grid (⌈M/BLOCK_M⌉): the splits' sums [splits,M,width] added in order, then what project_kernel does with its own."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.arange(0, BLOCK_R)
    inside = (rows[:, None] < M) & (ranks[None, :] < R)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for split in range(splits):
        acc += tl.load(sums_ptr + (split * M + rows[:, None]) * width + ranks[None, :], mask=inside, other=0.0)
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


def project(x2: torch.Tensor, downs: list[Down]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """h = drop(x) Aᵀ rounded to x's dtype, and h' = core(h).  x [M,K] -> h, h' [M,R] for each way down."""
    found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for together in _stacks(downs):
        chosen = [downs[i] for i in together]
        found |= zip(together, [_alone(x2, *chosen)] if len(chosen) == 1 else _stacked(x2, chosen), strict=True)
    return [found[i] for i in range(len(downs))]


def _stacks(downs: list[Down]) -> list[list[int]]:
    """Which ways down drop the same elements, and fit into one tile together."""
    stacks: list[list[int]] = []
    for i, down in enumerate(downs):
        for stack in stacks:
            first, ranks = downs[stack[0]], sum(downs[j].A.shape[0] for j in stack)
            alike = down.p == first.p and (not down.p or down.seed is first.seed)
            if alike and ranks + down.A.shape[0] <= configs.MAX_RANK:
                stack.append(i)
                break
        else:
            stacks.append([i])
    return stacks


def _alone(x2: torch.Tensor, down: Down) -> tuple[torch.Tensor, torch.Tensor]:
    (M, K), R, core = x2.shape, down.A.shape[0], down.core
    share = configs.project(M, K, R, x2.dtype, launch.arch_of(x2))
    if share.splits > 1:
        return finished(_sums(x2, down, share), 0, R, core, philox.scale(down.p), x2.dtype)
    h = x2.new_empty(M, R)
    # A core too wide for registers is a product of its own.
    inside = core is not None and configs.mixes(R, x2.dtype)
    mixed = x2.new_empty(M, R) if inside else h
    _launch(x2, down, share, core if inside else None, h, mixed)
    return h, mixed if inside else mix(h, core)


def _stacked(x2: torch.Tensor, downs: list[Down]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    stack = downs[0]._replace(A=torch.cat([down.A for down in downs]))
    sums = _sums(x2, stack, configs.project(*x2.shape, stack.A.shape[0], x2.dtype, launch.arch_of(x2)))
    found, first = [], 0
    for down in downs:
        R = down.A.shape[0]
        found.append(finished(sums, first, R, down.core, philox.scale(down.p), x2.dtype))
        first += R
    return found


def _sums(x2: torch.Tensor, down: Down, share: configs.Share) -> torch.Tensor:
    """drop(x) Aᵀ before its scale, in fp32 parts to be added.  [splits,M,R]"""
    sums = x2.new_empty(share.splits, x2.shape[0], down.A.shape[0], dtype=torch.float32)
    _launch(x2, down, share, None, sums, sums)
    return sums


def _launch(
    x2: torch.Tensor, down: Down, share: configs.Share, core: torch.Tensor | None, h: torch.Tensor, mixed: torch.Tensor
) -> None:
    (M, K), R, tile = x2.shape, down.A.shape[0], share.tile
    if M:
        with launch.on(x2):
            project_kernel[triton.cdiv(M, tile.BLOCK_M), share.splits](
                x2, down.A, x2 if core is None else core, launch.seed_of(down.seed, x2), h, mixed, M, K, R, *x2.stride(),
                *down.A.stride(), *_strides(core), launch.groups(K), philox.threshold(down.p), philox.scale(down.p), share.steps,
                DROPS=down.p > 0, CORE=_dims(core), SPLIT=h.dim() == 3, PRECISION=launch.precision(x2),
                **tile.blocks("BLOCK_M", "BLOCK_K"), num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip


def finished(
    sums: torch.Tensor, first: int, R: int, core: torch.Tensor | None, scale: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """scale·Σ parts, R columns from `first` on, rounded to dtype, and its product with the core.  [splits,M,·] -> [M,R] twice"""
    splits, M, width = sums.shape
    h = sums.new_empty(M, R, dtype=dtype)
    inside = core is not None and configs.mixes(R, dtype)
    mixed = torch.empty_like(h) if inside else h
    tile = configs.finish(R, dtype)
    if M:
        with launch.on(sums):
            finish_kernel[(triton.cdiv(M, tile.BLOCK_M),)](
                sums[..., first:], core if inside else h, h, mixed, M, R, width, *_strides(core if inside else None), scale, splits,
                CORE=_dims(core if inside else None), PRECISION=launch.precision(h),
                **tile.blocks("BLOCK_M"), num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
    return h, mixed if inside else mix(h, core)


def _dims(core: torch.Tensor | None) -> int:
    return 0 if core is None else core.dim()


def _strides(core: torch.Tensor | None) -> tuple[int, int]:
    return (0, 0) if core is None else (core.stride(0), core.stride(-1))
