"""grad_output: u = dy (s·gain⊙B), P = dyᵀ h_core, Σ dy and Σ dy⊙kept, in one pass over dy.

A program computes BLOCK_N columns over one split of the rows, and holds their part of B. It sums P
and the two vectors over its rows in registers; of u it computes the terms of its columns. Both are
written as fp32 parts, which two more kernels add in order, without atomics: project_finish_kernel
adds those of u, and grad_output_finish_kernel those of P, which it multiplies by s, gain and
out_scale.

For many ranks the parts of u would be more bytes than a second pass over dy: u is then a projection
of dy, in a pass of its own (configs.one_pass).
"""

import itertools

import torch
import triton
import triton.language as tl

from lorafast.engine.kernels import configs, launch
from lorafast.engine.kernels.grad_project import sum_over_rows
from lorafast.engine.kernels.project import finish, project
from lorafast.engine.kernels.scale_cast import scale_cast
from lorafast.engine.precision import apply_core, low_rank_grad_dtype, scaled_to_fp16
from lorafast.engine.problem import DownProj, OutputGrads, UpProjGrads, UpProjGradSpec


@triton.jit(do_not_specialize=["M", "steps"])
def grad_output_kernel(
    dy_ptr, kept_ptr, h_core_ptr, B_ptr, u_ptr, P_ptr, sums_ptr, M, N, R, live,
    stride_dm, stride_dn, stride_km, stride_kn, stride_hm, stride_hr, steps, one,
    U: tl.constexpr, P: tl.constexpr, SUMS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Parts of u, P and the sums, all fp32.  Grid (⌈N/BLOCK_N⌉, splits).

    h_core [M,live], B [N,R] dense along its rows -> u [⌈N/BLOCK_N⌉,M,R] (if U), P [splits,N,live]
    (if P), sums [splits,SUMS,N]. SUMS: 1 for Σ dy, 2 for Σ dy⊙kept too, 0 for none. LANES: the rows
    that are summed apart, so that no step has to add what different threads hold. one: 1.

    Both products have the ranks as rows. With fewer than 64 of them tensor cores read registers.
    """
    block, split = tl.program_id(0), tl.program_id(1).to(tl.int64)
    grad_output_rows(
        dy_ptr, kept_ptr, h_core_ptr, B_ptr, u_ptr, P_ptr, sums_ptr,
        block, split, 0, split, M, M, N, R, live,
        stride_dm, stride_dn, stride_km, stride_kn, stride_hm, stride_hr, steps, one,
        U, P, SUMS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R, LANES,
    )  # fmt: skip


@triton.jit
def grad_output_rows(
    dy_ptr, kept_ptr, h_core_ptr, B_ptr, u_ptr, P_ptr, sums_ptr,
    block, part, start, split, end, M, N, R, live,
    stride_dm, stride_dn, stride_km, stride_kn, stride_hm, stride_hr, steps, one,
    U: tl.constexpr, P: tl.constexpr, SUMS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Compute a part of P and of the sums, and u: of one split of the rows from `start` on.

    A split is `steps` blocks of rows; rows from `end` on are not read. block: of columns.
    """
    cols = block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tl.arange(0, BLOCK_R)
    if U:
        B = tl.load(
            B_ptr + cols[None, :] * R + ranks[:, None],
            mask=(cols[None, :] < N) & (ranks[:, None] < R),
            other=0.0,
        )
    if P:
        P_sum = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    if SUMS > 0:
        total = tl.zeros((LANES, BLOCK_N), tl.float32)
    if SUMS > 1:
        dot = tl.zeros((LANES, BLOCK_N), tl.float32)
        # Loads that feed no product are not pipelined: each step loads kept for the next one.
        next_kept = _rows_of(
            kept_ptr, start + split * steps * BLOCK_M, cols, end, N, stride_km, stride_kn, BLOCK_M
        )
    for step in range(steps):
        first_row = start + (split * steps + step) * BLOCK_M
        rows = first_row + tl.arange(0, BLOCK_M)
        dy = _rows_of(dy_ptr, first_row, cols, end, N, stride_dm, stride_dn, BLOCK_M)
        if SUMS > 1:
            kept = next_kept
            next_kept = _rows_of(
                kept_ptr, first_row + BLOCK_M, cols, end, N, stride_km, stride_kn, BLOCK_M
            )
        if U:
            u = tl.trans(tl.dot(B, tl.trans(dy), input_precision=PRECISION))
            where = (block.to(tl.int64) * M + rows[:, None]) * R + ranks[None, :]
            tl.store(u_ptr + where, u, mask=(rows[:, None] < end) & (ranks[None, :] < R))
        if P:
            h_core = tl.load(
                h_core_ptr + rows[None, :] * stride_hm + ranks[:, None] * stride_hr,
                mask=(rows[None, :] < end) & (ranks[:, None] < live),
                other=0.0,
            )
            if BLOCK_R < 64 or not (U or SUMS > 0):
                P_sum = tl.dot(h_core, dy, P_sum, input_precision=PRECISION)
            else:
                # A product of 64 rows reads shared memory, and as a sum of its own it would go on
                # beyond its step, while the loads of a later one overwrite dy: of a dy with two
                # uses the compiler keeps no further copy. The product with `one` waits for it.
                P_sum += tl.dot(h_core, dy, input_precision=PRECISION) * one
        if SUMS > 0:
            total += _sum_apart(dy.to(tl.float32), LANES)
        if SUMS > 1:
            dot += _sum_apart(dy.to(tl.float32) * kept.to(tl.float32), LANES)
    if P:
        where = (part * N + cols[None, :]) * live + ranks[:, None]
        tl.store(P_ptr + where, P_sum, mask=(cols[None, :] < N) & (ranks[:, None] < live))
    where = sums_ptr + part * SUMS * N + cols
    if SUMS > 0:
        tl.store(where, tl.sum(total, axis=0), mask=cols < N)
    if SUMS > 1:
        tl.store(where + N, tl.sum(dot, axis=0), mask=cols < N)


@triton.jit
def _rows_of(ptr, first_row, cols, M, N, stride_m, stride_n, BLOCK_M: tl.constexpr):
    """Return BLOCK_M rows of a matrix [M,N], zero outside it."""
    rows = first_row + tl.arange(0, BLOCK_M)
    return tl.load(
        ptr + rows[:, None] * stride_m + cols[None, :] * stride_n,
        mask=(rows[:, None] < M) & (cols[None, :] < N),
        other=0.0,
    )


@triton.jit
def _sum_apart(tile, LANES: tl.constexpr):
    """Return the sum of a tile's groups of LANES rows, [LANES, columns]."""
    return tl.sum(tl.reshape(tile, (tile.shape[0] // LANES, LANES, tile.shape[1])), axis=0)


@triton.jit(
    do_not_specialize=[
        "skipped", "frozen", "splits", "has_gain", "has_out_scale",
        "wants_B", "wants_out_scale", "has_scale",
    ]
)  # fmt: skip
def grad_output_finish_kernel(
    P_ptr, gain_ptr, out_scale_ptr, B_ptr, scale_ptr, dB_ptr, d_out_scale_ptr, N, R, width,
    stride_bn, stride_br, skipped, frozen, splits, has_gain, has_out_scale,
    wants_B, wants_out_scale, has_scale, scaling,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dB [N,R] = out_scale⊙P and d_out_scale [N] = rowsum(P⊙B), P = s·gain⊙Σ parts.

    Grid (⌈N/BLOCK_N⌉,). The parts [splits,N,width] start at column `skipped` of B, and are added in
    order. The first `frozen` columns of dB are 0. has_scale: s is read from scale_ptr, and scaling
    is 1.
    """
    grad_output_finish_rows(
        P_ptr, gain_ptr, out_scale_ptr, B_ptr, scale_ptr, dB_ptr, d_out_scale_ptr, N, R, width,
        stride_bn, stride_br, skipped, frozen, splits, has_gain, has_out_scale,
        wants_B, wants_out_scale, has_scale, scaling, BLOCK_N, BLOCK_R,
    )  # fmt: skip


@triton.jit
def grad_output_finish_rows(
    P_ptr, gain_ptr, out_scale_ptr, B_ptr, scale_ptr, dB_ptr, d_out_scale_ptr, N, R, width,
    stride_bn, stride_br, skipped, frozen, splits, has_gain, has_out_scale,
    wants_B, wants_out_scale, has_scale, scaling,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Compute a program's rows of dB and d_out_scale; see grad_output_finish_kernel."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tl.arange(0, BLOCK_R)
    inside = (rows[:, None] < N) & (ranks[None, :] < R)
    computed = inside & (ranks[None, :] >= skipped)
    P = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for split in range(splits):
        P += tl.load(
            P_ptr + (split * N + rows[:, None]) * width + ranks[None, :] - skipped,
            mask=computed,
            other=0.0,
        )
    P *= scaling * tl.load(scale_ptr, mask=has_scale != 0, other=1.0).to(tl.float32)
    P *= tl.load(gain_ptr + rows, mask=((rows < N) & (has_gain != 0)) != 0, other=1.0).to(
        tl.float32
    )[:, None]
    if wants_out_scale:
        B = tl.load(
            B_ptr + rows[:, None] * stride_bn + ranks[None, :] * stride_br, mask=inside, other=0.0
        ).to(tl.float32)
        tl.store(d_out_scale_ptr + rows, tl.sum(P * B, axis=1), mask=rows < N)
    if wants_B:
        P *= tl.load(
            out_scale_ptr + rows, mask=((rows < N) & (has_out_scale != 0)) != 0, other=1.0
        ).to(tl.float32)[:, None]
        tl.store(
            dB_ptr + rows[:, None] * R + ranks[None, :],
            tl.where(ranks[None, :] < frozen, 0.0, P),
            mask=inside,
        )


def grad_output(
    dy2: torch.Tensor,
    specs: list[UpProjGradSpec],
    gain: torch.Tensor | None,
    kept2: torch.Tensor | None,
    want_bias: bool,
) -> OutputGrads:
    """Return what several adapters request of one dy, Σ dy and Σ dy⊙kept.  dy, kept [M,N]"""
    adapters: list[UpProjGrads] = []
    # The first pass over dy computes the sums; without an adapter that pass computes nothing else.
    sums_requested = 2 if kept2 is not None else int(want_bias)
    sums = None
    for chunk in _chunks(specs) or ([[]] if sums_requested else []):
        grads, parts = _pass(dy2, chunk, gain, kept2, sums_requested)
        adapters += grads
        if sums_requested:
            sums, sums_requested = parts.sum(0), 0
    return OutputGrads(adapters, sums[0] if want_bias else None, None if kept2 is None else sums[1])


def _chunks(specs: list[UpProjGradSpec]) -> list[list[UpProjGradSpec]]:
    """Return the adapters in order, in chunks whose ranks fit in one tile."""
    chunks: list[list[UpProjGradSpec]] = []
    for spec in specs:
        ranks = spec.B.shape[1] + (sum(one.B.shape[1] for one in chunks[-1]) if chunks else 0)
        if chunks and ranks <= configs.MAX_RANK:
            chunks[-1].append(spec)
        else:
            chunks.append([spec])
    return chunks


def _pass(
    dy2: torch.Tensor,
    specs: list[UpProjGradSpec],
    gain: torch.Tensor | None,
    kept2: torch.Tensor | None,
    sums_requested: int,
) -> tuple[list[UpProjGrads], torch.Tensor | None]:
    """Return the gradients of one chunk, and the sums' parts [splits,sums,N] or None.

    sums_requested: their number, 1 for Σ dy, 2 for Σ dy⊙kept too, 0 for none.
    """
    (M, N), dtype = dy2.shape, dy2.dtype
    u_specs = [spec for spec in specs if _needs_u(spec)]
    P_specs = [spec for spec in specs if _needs_P(spec)]
    factors, inverses = _factors(u_specs, gain, dtype)
    h_cores = [live_columns(apply_core(spec.h, spec.core), spec) for spec in P_specs]
    u_ranks, P_ranks = sum(B.shape[1] for B in factors), sum(h.shape[1] for h in h_cores)
    column_sums = bool(P_ranks or sums_requested)
    one_pass = bool(factors) and column_sums and configs.one_pass(u_ranks, P_ranks)
    tile_ranks = max(1, P_ranks, one_pass * u_ranks)
    split = configs.grad_output(M, N, tile_ranks, dtype, launch.arch_of(dy2), sums_requested)
    blocks, splits = configs.ceil_div(N, split.tile.BLOCK_N), split.splits
    u = launch.empty(dy2, torch.float32, blocks, M, u_ranks) if one_pass else None
    P = launch.empty(dy2, torch.float32, splits, N, P_ranks) if P_ranks else None
    sums = launch.empty(dy2, torch.float32, splits, sums_requested, N) if sums_requested else None
    if column_sums and N:
        B = _side_by_side(factors) if one_pass else None
        _launch(dy2, kept2, _side_by_side(h_cores), B, u, P, sums, split)
    pairs = iter(_u_and_v(dy2, u, factors, inverses, u_specs))
    P_firsts = itertools.accumulate((h.shape[1] for h in h_cores), initial=0)
    grads = []
    for spec in specs:
        own_u, v = next(pairs) if _needs_u(spec) else (None, None)
        dB = d_out_scale = None
        if _needs_P(spec):
            dB, d_out_scale = _finish_P(P, next(P_firsts), spec, gain, dy2)
        d_core = _d_core(own_u, spec) if spec.want_core else None
        grads.append(UpProjGrads(v if spec.want_v else None, dB, d_core, d_out_scale))
    return grads, sums


def _factors(
    specs: list[UpProjGradSpec], gain: torch.Tensor | None, dtype: torch.dtype
) -> tuple[list[torch.Tensor], list[torch.Tensor] | None]:
    """Return s·gain⊙out_scale⊙B of every adapter in dtype.

    For fp16 each is multiplied by a power of two, and those by which u has to be multiplied follow.
    """
    wide = low_rank_grad_dtype(dtype)
    factors = [
        scale_cast(spec.B, wide, spec.scaling, _product(gain, spec.out_scale)) for spec in specs
    ]
    if wide == dtype:
        return factors, None
    scaled = [scaled_to_fp16(factor) for factor in factors]
    return [factor for factor, _ in scaled], [inverse for _, inverse in scaled]


def _u_and_v(
    dy2: torch.Tensor,
    parts: torch.Tensor | None,
    factors: list[torch.Tensor],
    inverses: list[torch.Tensor] | None,
    specs: list[UpProjGradSpec],
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return u and v = u·core of every adapter, from parts [blocks,M,·] or by a pass over dy."""
    cores = [None if spec.core is None else spec.core.t() for spec in specs]
    dtype = low_rank_grad_dtype(dy2.dtype)
    if parts is None:
        down_projs = [DownProj(B.t(), core) for B, core in zip(factors, cores, strict=True)]
        pairs = project(dy2, down_projs, dtype)
    else:
        firsts = itertools.accumulate((B.shape[1] for B in factors), initial=0)
        pairs = [
            finish(parts, first, B.shape[1], core, 1.0, dtype)
            for first, B, core in zip(firsts, factors, cores, strict=False)
        ]
    if inverses is None:
        return pairs
    return [(u * k, v * k) for (u, v), k in zip(pairs, inverses, strict=True)]


def _launch(dy2, kept2, h_core, B, u, P, sums, split) -> None:
    (M, N), tile = dy2.shape, split.tile
    R, live = 0 if u is None else u.shape[2], 0 if P is None else P.shape[2]
    # dy stands in for an absent tensor, whose argument is neither read nor written.
    kept2, h_core, B, u_out, P_out, sums_out = (
        dy2 if tensor is None else tensor for tensor in (kept2, h_core, B, u, P, sums)
    )
    launch.run(
        grad_output_kernel, (configs.ceil_div(N, tile.BLOCK_N), split.splits), tile,
        dy2, kept2, h_core, B, u_out, P_out, sums_out, M, N, R, live,
        *dy2.stride(), *kept2.stride(), *h_core.stride(), split.steps, 1.0,
        U=u is not None, P=P is not None, SUMS=0 if sums is None else sums.shape[1],
        PRECISION=launch.precision(dy2), LANES=configs.rows_at_once(tile, dy2.dtype),
    )  # fmt: skip


def _finish_P(
    P: torch.Tensor | None,
    first: int,
    spec: UpProjGradSpec,
    gain: torch.Tensor | None,
    dy2: torch.Tensor,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return dB and d_out_scale of one adapter, whose parts start at column `first` of P."""
    (N, R), has_scale = spec.B.shape, isinstance(spec.scaling, torch.Tensor)
    dB = launch.empty(dy2, torch.float32, N, R) if spec.want_B else None
    d_out_scale = launch.empty(dy2, torch.float32, N) if spec.want_out_scale else None
    if P is None:  # every column is frozen
        return dB.zero_(), d_out_scale
    tile = configs.grad_output_finish(R)
    # P stands in for an absent tensor, whose argument is not read.
    vectors = [P if one is None else one.contiguous() for one in (gain, spec.out_scale)]
    outputs = [P if one is None else one for one in (dB, d_out_scale)]
    if N:
        own_P = P[..., first:] if first else P
        launch.run(
            grad_output_finish_kernel, (configs.ceil_div(N, tile.BLOCK_N),), tile,
            own_P, *vectors, spec.B, spec.scaling if has_scale else P, *outputs,
            N, R, P.shape[2], *spec.B.stride(), skipped_columns(spec), spec.frozen_columns,
            P.shape[0], int(gain is not None), int(spec.out_scale is not None),
            int(spec.want_B), int(spec.want_out_scale),
            int(has_scale), 1.0 if has_scale else float(spec.scaling),
        )  # fmt: skip
    return dB, d_out_scale


def _d_core(u: torch.Tensor, spec: UpProjGradSpec) -> torch.Tensor:
    """Return uᵀh, or its diagonal if the core is diagonal."""
    return (u.float() * spec.h).sum(0) if spec.core.dim() == 1 else sum_over_rows(spec.h, u)


def _needs_u(spec: UpProjGradSpec) -> bool:
    return spec.want_v or spec.want_core


def _needs_P(spec: UpProjGradSpec) -> bool:
    return spec.want_B or spec.want_out_scale


def live_columns(h_core: torch.Tensor, spec: UpProjGradSpec) -> torch.Tensor:
    """Return the columns of h_core that P is computed of."""
    skipped = skipped_columns(spec)
    return h_core[:, skipped:] if skipped else h_core


def skipped_columns(spec: UpProjGradSpec) -> int:
    """Return the number of B's frozen columns, unless d_out_scale needs their P."""
    return 0 if spec.want_out_scale else spec.frozen_columns


def _product(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    """Return a⊙b, where None counts as ones."""
    if a is None or b is None:
        return b if a is None else a
    return a * b


def _side_by_side(blocks: list[torch.Tensor]) -> torch.Tensor | None:
    """Return the blocks' columns as one contiguous matrix, None for no block."""
    if not blocks:
        return None
    return blocks[0].contiguous() if len(blocks) == 1 else torch.cat(blocks, dim=1)
