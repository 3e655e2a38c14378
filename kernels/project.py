"""project: h = drop(x) Aᵀ and h' = core(h), x read once.

A program owns BLOCK_M rows and all R ranks, and walks its share of K; the mask is remade in registers. Few rows leave most of a
GPU idle, so K may be split: then every split writes its fp32 sums, and finish_kernel adds them in order. No atomics. It is also
where a core multiplies, from registers.

Several ways down that drop alike, as siblings and adapters without dropout do, are one stack of A: x is read once for all of them.
"""

import itertools

import torch
import triton
import triton.language as tl

from lorafast.engine import philox
from lorafast.engine.kernels import configs, launch
from lorafast.engine.kernels.philox import keep_tile
from lorafast.engine.problem import DownProj
from lorafast.engine.reference import mix


@triton.jit(do_not_specialize=["M", "steps"])
def project_kernel(
    x_ptr, A_ptr, seed_ptr, h_ptr, M, K, R, stride_xm, stride_xk, stride_ar, stride_ak, groups, threshold, scale, steps,
    DROPS: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Grid (⌈M/BLOCK_M⌉, splits) -> h [M,R]. PARTS: h_ptr takes fp32 sums [splits,M,R], unscaled, for finish_kernel.

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
        x = tl.load(
            x_ptr + rows[:, None] * stride_xm + cols[None, :] * stride_xk, mask=inside, other=0.0
        )
        if DROPS:
            kept = keep_tile(seed, rows, start // 8, groups, threshold, BLOCK_K // 8)
            x = tl.where(kept, x, 0.0).to(x.dtype)
        inside = (ranks[:, None] < R) & (cols[None, :] < K)
        A = tl.load(
            A_ptr + ranks[:, None] * stride_ar + cols[None, :] * stride_ak, mask=inside, other=0.0
        )
        acc = tl.dot(x, tl.trans(A.to(x.dtype)), acc, input_precision=PRECISION)
    inside = (rows[:, None] < M) & (ranks[None, :] < R)
    if PARTS:
        tl.store(
            h_ptr + (tl.program_id(1).to(tl.int64) * M + rows[:, None]) * R + ranks[None, :],
            acc,
            mask=inside,
        )
    else:
        tl.store(
            h_ptr + rows[:, None] * R + ranks[None, :],
            (acc * scale).to(h_ptr.dtype.element_ty),
            mask=inside,
        )


@triton.jit(do_not_specialize=["M", "splits"])
def finish_kernel(
    parts_ptr, core_ptr, h_ptr, mixed_ptr, M, R, width, stride_ci, stride_cj, scale, splits,
    CORE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Grid (⌈M/BLOCK_M⌉,): parts [splits,M,width] added in order; h their first R columns, scaled, and h' from the rounded h.

    CORE: the number of the core's dimensions, 0 for none.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.arange(0, BLOCK_R)
    inside = (rows[:, None] < M) & (ranks[None, :] < R)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for split in range(splits):
        acc += tl.load(
            parts_ptr + (split * M + rows[:, None]) * width + ranks[None, :], mask=inside, other=0.0
        )
    h = (acc * scale).to(h_ptr.dtype.element_ty)
    where = rows[:, None] * R + ranks[None, :]
    tl.store(h_ptr + where, h, mask=inside)
    if CORE == 1:
        core = tl.load(core_ptr + ranks * stride_ci, mask=ranks < R, other=0.0).to(h.dtype)
        tl.store(mixed_ptr + where, h * core[None, :], mask=inside)
    if CORE == 2:
        # The core as [j, i], so that h' = h coreᵀ is a plain product.
        square = (ranks[:, None] < R) & (ranks[None, :] < R)
        core = tl.load(
            core_ptr + ranks[None, :] * stride_ci + ranks[:, None] * stride_cj,
            mask=square,
            other=0.0,
        ).to(h.dtype)
        tl.store(
            mixed_ptr + where, tl.dot(h, core, input_precision=PRECISION).to(h.dtype), mask=inside
        )


def project(x2: torch.Tensor, downs: list[DownProj]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """h = drop(x) Aᵀ rounded to x's dtype, and h' = core(h).  x [M,K] -> h, h' [M,R] for each way down."""
    found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for together in _stacks(downs):
        chosen = [downs[i] for i in together]
        found |= zip(
            together,
            [_alone(x2, *chosen)] if len(chosen) == 1 else _stacked(x2, chosen),
            strict=True,
        )
    return [found[i] for i in range(len(downs))]


def _stacks(downs: list[DownProj]) -> list[list[int]]:
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


def _alone(x2: torch.Tensor, down: DownProj) -> tuple[torch.Tensor, torch.Tensor]:
    (M, K), R = x2.shape, down.A.shape[0]
    share = configs.project(M, K, R, x2.dtype, launch.arch_of(x2))
    if share.splits > 1 or (down.core is not None and configs.mixes(R, x2.dtype)):
        return finished(_parts(x2, down, share), 0, R, down.core, philox.scale(down.p), x2.dtype)
    h = x2.new_empty(M, R)
    _launch(x2, down, share, h)
    return h, mix(h, down.core)


def _stacked(x2: torch.Tensor, downs: list[DownProj]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    stack = downs[0]._replace(A=torch.cat([down.A for down in downs]))
    parts = _parts(
        x2, stack, configs.project(*x2.shape, stack.A.shape[0], x2.dtype, launch.arch_of(x2))
    )
    firsts = itertools.accumulate((down.A.shape[0] for down in downs), initial=0)
    scale = philox.scale(stack.p)
    return [
        finished(parts, i, down.A.shape[0], down.core, scale, x2.dtype)
        for i, down in zip(firsts, downs, strict=False)
    ]


def _parts(x2: torch.Tensor, down: DownProj, share: configs.Share) -> torch.Tensor:
    """drop(x) Aᵀ before its scale, in fp32 parts to be added.  [splits,M,R]"""
    parts = x2.new_empty(share.splits, x2.shape[0], down.A.shape[0], dtype=torch.float32)
    _launch(x2, down, share, parts)
    return parts


def _launch(x2: torch.Tensor, down: DownProj, share: configs.Share, h: torch.Tensor) -> None:
    """Into h [M,R], or into parts [splits,M,R]."""
    (M, K), R, tile = x2.shape, down.A.shape[0], share.tile
    if M:
        with launch.on(x2):
            project_kernel[configs.ceil_div(M, tile.BLOCK_M), share.splits](
                x2, down.A, launch.seed_of(down.seed, x2), h, M, K, R, *x2.stride(), *down.A.stride(), launch.groups(K),
                philox.threshold(down.p), philox.scale(down.p), share.steps,
                DROPS=down.p > 0, PARTS=h.dim() == 3, PRECISION=launch.precision(x2),
                **tile.blocks("BLOCK_M", "BLOCK_K"), num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip


def finished(
    parts: torch.Tensor,
    first: int,
    R: int,
    core: torch.Tensor | None,
    scale: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """scale·Σ parts, R columns from `first` on, rounded to dtype, and its product with the core.  [splits,M,·] -> [M,R] twice"""
    splits, M, width = parts.shape
    h = parts.new_empty(M, R, dtype=dtype)
    # A core too wide for registers is a product of its own.
    inside = core is not None and configs.mixes(R, dtype)
    mixed = torch.empty_like(h) if inside else h
    tile, strides = configs.finish(R), (core.stride(0), core.stride(-1)) if inside else (0, 0)
    if M:
        with launch.on(parts):
            finish_kernel[(configs.ceil_div(M, tile.BLOCK_M),)](
                parts[..., first:], core if inside else h, h, mixed, M, R, width, *strides, scale, splits,
                CORE=core.dim() if inside else 0, PRECISION=launch.precision(h),
                **tile.blocks("BLOCK_M"), num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
    return h, mixed if inside else mix(h, core)
