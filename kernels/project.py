"""project: h = drop(x) Aᵀ and h_core = h coreᵀ, reading x once.

A program computes BLOCK_M rows of h and all R ranks over one split of K; it recomputes the mask in
registers. Few rows would leave most of a GPU idle, so K may be split: every split then writes fp32
sums, and project_finish_kernel adds them in order, without atomics, and multiplies by the core.

Down-projections with the same mask (sibling layers, or adapters without dropout) stack their A, so
that x is read once for all of them.
"""

import itertools

import torch
import triton
import triton.language as tl

from lorafast.engine import philox
from lorafast.engine.kernels import configs, launch
from lorafast.engine.kernels.philox import drop_tile
from lorafast.engine.kernels.scale_cast import scale_cast
from lorafast.engine.precision import apply_core
from lorafast.engine.problem import DownProj


@triton.jit(do_not_specialize=["M", "steps"])
def project_kernel(
    x_ptr, A_ptr, seed_ptr, h_ptr, M, K, R, stride_xm, stride_xk, stride_ar, stride_ak,
    groups, threshold, scale, steps,
    DROPS: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """h [M,R] = scale·drop(x) Aᵀ.  Grid (⌈M/BLOCK_M⌉, splits).

    PARTS: h_ptr receives fp32 sums [splits,M,R], unscaled, for project_finish_kernel. The number of
    splits is no constexpr: it changes with M, and every batch size would compile anew.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    project_rows(
        x_ptr, A_ptr, seed_ptr, h_ptr, rows, M, rows, M, K, R,
        stride_xm, stride_xk, stride_ar, stride_ak, groups, threshold, scale, steps,
        DROPS, PARTS, PRECISION, BLOCK_M, BLOCK_K, BLOCK_R,
    )  # fmt: skip


@triton.jit
def project_rows(
    x_ptr, A_ptr, seed_ptr, h_ptr, rows, end, mask_rows, M, K, R,
    stride_xm, stride_xk, stride_ar, stride_ak, groups, threshold, scale, steps,
    DROPS: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Compute the rows of h before `end`, or this split's part of them, of h [M,R].

    mask_rows: the rows whose dropout bits they have.
    """
    ranks = tl.arange(0, BLOCK_R)
    first_col = tl.program_id(1) * steps * BLOCK_K
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    if DROPS:
        seed = tl.load(seed_ptr)
    for step in range(steps):
        start = first_col + step * BLOCK_K
        cols = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        inside = (rows[:, None] < end) & (cols[None, :] < K)
        x = tl.load(
            x_ptr + rows[:, None] * stride_xm + cols[None, :] * stride_xk, mask=inside, other=0.0
        )
        if DROPS:
            x = drop_tile(x, seed, mask_rows, start // 8, groups, threshold, BLOCK_K // 8)
        inside = (ranks[:, None] < R) & (cols[None, :] < K)
        A = tl.load(
            A_ptr + ranks[:, None] * stride_ar + cols[None, :] * stride_ak, mask=inside, other=0.0
        )
        acc = tl.dot(x, tl.trans(A.to(x.dtype)), acc, input_precision=PRECISION)
    inside = (rows[:, None] < end) & (ranks[None, :] < R)
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
def project_finish_kernel(
    parts_ptr, core_ptr, h_ptr, h_core_ptr, M, R, width, stride_ci, stride_cj, scale, splits,
    CORE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """h [M,R] = scale·Σ parts, added in order, and h_core from the rounded h.  Grid (⌈M/BLOCK_M⌉,).

    The parts are the first R columns of [splits,M,width]. CORE: the core's dimensions, 0 for none.
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
        tl.store(h_core_ptr + where, h * core[None, :], mask=inside)
    if CORE == 2:
        # The core is loaded as [j, i], so that h coreᵀ is a plain product.
        square = (ranks[:, None] < R) & (ranks[None, :] < R)
        core = tl.load(
            core_ptr + ranks[None, :] * stride_ci + ranks[:, None] * stride_cj,
            mask=square,
            other=0.0,
        ).to(h.dtype)
        tl.store(
            h_core_ptr + where, tl.dot(h, core, input_precision=PRECISION).to(h.dtype), mask=inside
        )


def project(
    x2: torch.Tensor, down_projs: list[DownProj], dtype: torch.dtype | None = None
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return h = drop(x) Aᵀ, rounded to dtype, and h_core = core(h) of every down-projection.

    x [M,K] -> h, h_core [M,R] each. dtype: x's if not given.
    """
    dtype = dtype or x2.dtype
    results: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for indices in _stacks(down_projs):
        stack = [down_projs[i] for i in indices]
        pairs = (
            [_project_one(x2, *stack, dtype)]
            if len(stack) == 1
            else _project_stack(x2, stack, dtype)
        )
        results |= zip(indices, pairs, strict=True)
    return [results[i] for i in range(len(down_projs))]


def _stacks(down_projs: list[DownProj]) -> list[list[int]]:
    """Return the indices of down-projections that share a mask and fit in one tile, by stack."""
    stacks: list[list[int]] = []
    for i, down in enumerate(down_projs):
        for stack in stacks:
            first, ranks = down_projs[stack[0]], sum(down_projs[j].A.shape[0] for j in stack)
            same_mask = down.p == first.p and (not down.p or down.seed is first.seed)
            if same_mask and ranks + down.A.shape[0] <= configs.MAX_RANK:
                stack.append(i)
                break
        else:
            stacks.append([i])
    return stacks


def _project_one(
    x2: torch.Tensor, down: DownProj, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    (M, K), R = x2.shape, down.A.shape[0]
    split = configs.project(M, K, R, x2.dtype, launch.arch_of(x2))
    in_registers = down.core is not None and configs.core_in_registers(R, dtype)
    if split.splits > 1 or in_registers:
        parts = _partial_sums(x2, down, split)
        return finish(parts, 0, R, down.core, philox.scale(down.p), dtype)
    h = launch.empty(x2, dtype, M, R)
    _launch(x2, down, split, h)
    return h, apply_core(h, down.core)


def _project_stack(
    x2: torch.Tensor, down_projs: list[DownProj], dtype: torch.dtype
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    stack = down_projs[0]._replace(A=torch.cat([down.A for down in down_projs]))
    split = configs.project(*x2.shape, stack.A.shape[0], x2.dtype, launch.arch_of(x2))
    parts = _partial_sums(x2, stack, split)
    firsts = itertools.accumulate((down.A.shape[0] for down in down_projs), initial=0)
    scale = philox.scale(stack.p)
    return [
        finish(parts, first, down.A.shape[0], down.core, scale, dtype)
        for first, down in zip(firsts, down_projs, strict=False)
    ]


def _partial_sums(x2: torch.Tensor, down: DownProj, split: configs.SplitTile) -> torch.Tensor:
    """Return drop(x) Aᵀ, unscaled, as fp32 parts that remain to be added: [splits,M,R]."""
    parts = launch.empty(x2, torch.float32, split.splits, x2.shape[0], down.A.shape[0])
    _launch(x2, down, split, parts)
    return parts


def _launch(x2: torch.Tensor, down: DownProj, split: configs.SplitTile, h: torch.Tensor) -> None:
    """Write drop(x) Aᵀ to h [M,R], or its parts to h [splits,M,R]."""
    (M, K), R, tile = x2.shape, down.A.shape[0], split.tile
    if not M:
        return
    A = down.A
    if x2.itemsize < 4 and configs.casts_first(tile, M, K, R, launch.arch_of(x2)):
        A = scale_cast(A, x2.dtype)
    launch.run(
        project_kernel, (configs.ceil_div(M, tile.BLOCK_M), split.splits), tile,
        x2, A, launch.seed_of(down.seed, x2), h, M, K, R, *x2.stride(), *A.stride(),
        *launch.dropout(K, down.p), split.steps,
        DROPS=down.p > 0, PARTS=h.dim() == 3, PRECISION=launch.precision(x2),
    )  # fmt: skip


def finish(
    parts: torch.Tensor,
    first: int,
    R: int,
    core: torch.Tensor | None,
    scale: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return h = scale·Σ parts in dtype, and h_core = core(h).

    parts [splits,M,·] -> h, h_core [M,R]. h takes R columns of the parts from column `first` on.
    """
    splits, M, width = parts.shape
    # A view takes longer than the rest of this function.
    own_parts = parts[..., first:] if first else parts
    h = launch.empty(parts, dtype, M, R)
    # A core that is too wide for registers is multiplied by torch.
    in_registers = core is not None and configs.core_in_registers(R, dtype)
    h_core = torch.empty_like(h) if in_registers else h
    strides = (core.stride(0), core.stride(-1)) if in_registers else (0, 0)
    tile = configs.project_finish(R)
    if M:
        launch.run(
            project_finish_kernel, (configs.ceil_div(M, tile.BLOCK_M),), tile,
            own_parts, core if in_registers else h, h, h_core, M, R, width, *strides,
            scale, splits, CORE=core.dim() if in_registers else 0,
            PRECISION=launch.precision(h),
        )  # fmt: skip
    return h, h_core if in_registers else apply_core(h, core)
