"""grad_output: everything a layer asks of dy, in one pass over it: u = dy (s·gain⊙B), P = dyᵀ h', Σ dy and Σ dy⊙kept.

A program owns BLOCK_N columns, whose part of B it holds, and walks its share of the rows. Along the columns it sums P and the two
vectors in registers; what it finds of u belongs to its columns only. Both are written as fp32 parts, and finishing kernels add the
parts in order: one for u (that of project), one for P, which multiplies by s, gain and out_scale on the way. No atomics.

A wide u would write more parts than it saves reading: then u is a projection of dy, in a pass of its own (configs.one_pass).
"""

import itertools

import torch
import triton
import triton.language as tl

from lorafast.engine.kernels import configs, launch
from lorafast.engine.kernels.grad_project import sum_over_rows
from lorafast.engine.kernels.project import finished, project
from lorafast.engine.kernels.scale_cast import scale_cast
from lorafast.engine.problem import DownProj, OutputGrads, UpProjGrads, UpProjGradSpec
from lorafast.engine.reference import mix


@triton.jit(do_not_specialize=["M", "asked", "steps"])
def grad_output_kernel(
    dy_ptr, kept_ptr, mixed_ptr, B_ptr, u_ptr, P_ptr, sums_ptr, M, N, R, live,
    stride_dm, stride_dn, stride_km, stride_kn, stride_hm, stride_hr, asked, steps,
    U: tl.constexpr, P: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Grid (⌈N/BLOCK_N⌉, splits) -> u fp32 [⌈N/BLOCK_N⌉,M,R], P fp32 [splits,N,live], sums fp32 [splits,2,N].

    h' [M,live], B [N,R] dense along its rows. asked: 0, 1 for Σ dy, 2 for Σ dy⊙kept too. They are always summed,
    which beside the reading is nothing.
    """
    own, split = tl.program_id(0), tl.program_id(1).to(tl.int64)
    cols = own.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tl.arange(0, BLOCK_R)
    if U:
        B = tl.load(
            B_ptr + cols[:, None] * R + ranks[None, :],
            mask=(cols[:, None] < N) & (ranks[None, :] < R),
            other=0.0,
        )
    if P:
        found = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    dot = tl.zeros((BLOCK_N,), tl.float32)
    for step in range(steps):
        rows = (split * steps + step) * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = (rows[:, None] < M) & (cols[None, :] < N)
        dy = tl.load(
            dy_ptr + rows[:, None] * stride_dm + cols[None, :] * stride_dn, mask=inside, other=0.0
        )
        if U:
            u = tl.dot(dy, B, input_precision=PRECISION)
            where = (own.to(tl.int64) * M + rows[:, None]) * R + ranks[None, :]
            tl.store(u_ptr + where, u, mask=(rows[:, None] < M) & (ranks[None, :] < R))
        if P:
            mixed = tl.load(
                mixed_ptr + rows[:, None] * stride_hm + ranks[None, :] * stride_hr,
                mask=(rows[:, None] < M) & (ranks[None, :] < live), other=0.0,
            )  # fmt: skip
            found = tl.dot(tl.trans(dy), mixed, found, input_precision=PRECISION)
        total += tl.sum(dy.to(tl.float32), axis=0)
        kept = tl.load(
            kept_ptr + rows[:, None] * stride_km + cols[None, :] * stride_kn,
            mask=(inside & (asked > 1)) != 0,
            other=0.0,
        )
        dot += tl.sum(dy.to(tl.float32) * kept.to(tl.float32), axis=0)
    if P:
        where = (split * N + cols[:, None]) * live + ranks[None, :]
        tl.store(P_ptr + where, found, mask=(cols[:, None] < N) & (ranks[None, :] < live))
    tl.store(sums_ptr + 2 * split * N + cols, total, mask=((cols < N) & (asked > 0)) != 0)
    tl.store(sums_ptr + (2 * split + 1) * N + cols, dot, mask=((cols < N) & (asked > 1)) != 0)


@triton.jit(
    do_not_specialize=[
        "skipped",
        "frozen",
        "splits",
        "gains",
        "scales",
        "wants_B",
        "wants_out_scale",
        "scaled",
    ]
)
def finish_P_kernel(
    P_ptr, gain_ptr, out_scale_ptr, B_ptr, scale_ptr, dB_ptr, d_out_scale_ptr, N, R, width, stride_bn, stride_br, skipped, frozen,
    splits, gains, scales, wants_B, wants_out_scale, scaled, scaling, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Grid (⌈N/BLOCK_N⌉,): P = s·gain⊙Σ parts, dB = out_scale⊙P with its first `frozen` columns 0, d_out_scale = rowsum(P⊙B).

    The parts [splits,N,width] begin at column `skipped` of B. scaled: s is at scale_ptr, and scaling is 1.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tl.arange(0, BLOCK_R)
    inside = (rows[:, None] < N) & (ranks[None, :] < R)
    there = inside & (ranks[None, :] >= skipped)
    P = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for split in range(splits):
        P += tl.load(
            P_ptr + (split * N + rows[:, None]) * width + ranks[None, :] - skipped,
            mask=there,
            other=0.0,
        )
    P *= scaling * tl.load(scale_ptr, mask=scaled != 0, other=1.0).to(tl.float32)
    P *= tl.load(gain_ptr + rows, mask=((rows < N) & (gains != 0)) != 0, other=1.0).to(tl.float32)[
        :, None
    ]
    if wants_out_scale:
        B = tl.load(
            B_ptr + rows[:, None] * stride_bn + ranks[None, :] * stride_br, mask=inside, other=0.0
        ).to(tl.float32)
        tl.store(d_out_scale_ptr + rows, tl.sum(P * B, axis=1), mask=rows < N)
    if wants_B:
        P *= tl.load(out_scale_ptr + rows, mask=((rows < N) & (scales != 0)) != 0, other=1.0).to(
            tl.float32
        )[:, None]
        tl.store(
            dB_ptr + rows[:, None] * R + ranks[None, :],
            tl.where(ranks[None, :] < frozen, 0.0, P),
            mask=inside,
        )


def grad_output(
    dy2: torch.Tensor,
    returns: list[UpProjGradSpec],
    gain: torch.Tensor | None,
    kept2: torch.Tensor | None,
    want_bias: bool,
) -> OutputGrads:
    """What several adapters ask of one dy, Σ dy and Σ dy⊙kept.  dy, kept [M,N]"""
    adapters: list[UpProjGrads] = []
    # The sums are taken in the first pass that looks at columns; without an adapter there still is one.
    asked = 2 if kept2 is not None else int(want_bias)
    sums = None
    for together in _chunks(returns) or ([[]] if asked else []):
        own, found = _pass(dy2, together, gain, kept2, asked)
        adapters += own
        if asked:
            sums, asked = found.sum(0), 0
    return OutputGrads(adapters, sums[0] if want_bias else None, None if kept2 is None else sums[1])


def _chunks(returns: list[UpProjGradSpec]) -> list[list[UpProjGradSpec]]:
    """The adapters in order, as many at a time as fit into one tile."""
    chunks: list[list[UpProjGradSpec]] = []
    for back in returns:
        if (
            chunks
            and sum(one.B.shape[1] for one in chunks[-1]) + back.B.shape[1] <= configs.MAX_RANK
        ):
            chunks[-1].append(back)
        else:
            chunks.append([back])
    return chunks


def _pass(
    dy2: torch.Tensor,
    returns: list[UpProjGradSpec],
    gain: torch.Tensor | None,
    kept2: torch.Tensor | None,
    asked: int,
) -> tuple[list[UpProjGrads], torch.Tensor | None]:
    """One chunk's gradients, and the parts of the sums [splits,2,N]. asked: 1 for Σ dy, 2 for Σ dy⊙kept too."""
    (M, N), dtype = dy2.shape, dy2.dtype
    ups = [back for back in returns if back.want_v or back.want_core]
    downs = [back for back in returns if back.want_B or back.want_out_scale]
    factors = [
        scale_cast(back.B, dtype, back.scaling, _product(gain, back.out_scale)) for back in ups
    ]
    live = [mix(back.h, back.core)[:, _skipped(back) :] for back in downs]
    widths = sum(B.shape[1] for B in factors), sum(mixed.shape[1] for mixed in live)
    columns = bool(widths[1] or asked)
    at_once = bool(ups) and columns and configs.one_pass(*widths, dtype)
    share = configs.grad_output(
        M, N, max(1, widths[1], at_once * widths[0]), dtype, launch.arch_of(dy2)
    )
    across, splits = configs.ceil_div(N, share.tile.BLOCK_N), share.splits
    u = dy2.new_empty(across, M, widths[0], dtype=torch.float32) if at_once else None
    P = dy2.new_empty(splits, N, widths[1], dtype=torch.float32) if widths[1] else None
    sums = dy2.new_empty(splits, 2, N, dtype=torch.float32) if asked else None
    if columns and N:
        _launch(
            dy2,
            kept2,
            _side_by_side(live),
            _side_by_side(factors) if at_once else None,
            u,
            P,
            sums,
            asked,
            share,
        )
    cores = [None if back.core is None else back.core.t() for back in ups]
    if at_once:
        firsts = itertools.accumulate((B.shape[1] for B in factors), initial=0)
        pairs = [
            finished(u, i, B.shape[1], core, 1.0, dtype)
            for i, B, core in zip(firsts, factors, cores, strict=False)
        ]
    else:
        pairs = project(
            dy2, [DownProj(B.t(), core) for B, core in zip(factors, cores, strict=True)]
        )
    of_P = itertools.accumulate((mixed.shape[1] for mixed in live), initial=0)
    in_u, in_P = iter(pairs), iter(of_P)
    found = []
    for back in returns:
        wants_u, wants_P = back.want_v or back.want_core, back.want_B or back.want_out_scale
        u_own, v = next(in_u) if wants_u else (None, None)
        dB, d_out_scale = _finish_P(P, next(in_P), back, gain, dy2) if wants_P else (None, None)
        found.append(
            UpProjGrads(
                v if back.want_v else None,
                dB,
                _d_core(u_own, back) if back.want_core else None,
                d_out_scale,
            )
        )
    return found, sums


def _launch(dy2, kept2, mixed, B, u, P, sums, asked, share) -> None:
    (M, N), tile = dy2.shape, share.tile
    R, live = 0 if u is None else u.shape[2], 0 if P is None else P.shape[2]
    # Whatever is not there is never read or written, but compiled: it lies as dy does.
    kept2, mixed, B, u_out, P_out, sums = (
        dy2 if one is None else one for one in (kept2, mixed, B, u, P, sums)
    )
    with launch.on(dy2):
        grad_output_kernel[configs.ceil_div(N, tile.BLOCK_N), share.splits](
            dy2, kept2, mixed, B, u_out, P_out, sums, M, N, R, live, *dy2.stride(), *kept2.stride(), *mixed.stride(),
            asked, share.steps, U=u is not None, P=P is not None, PRECISION=launch.precision(dy2),
            **tile.blocks("BLOCK_M", "BLOCK_N"), num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip


def _finish_P(
    P: torch.Tensor | None,
    first: int,
    back: UpProjGradSpec,
    gain: torch.Tensor | None,
    dy2: torch.Tensor,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """dB and d_out_scale of one adapter, whose parts begin at column `first` of P."""
    (N, R), skipped, scaled = back.B.shape, _skipped(back), isinstance(back.scaling, torch.Tensor)
    dB = dy2.new_empty(N, R, dtype=torch.float32) if back.want_B else None
    d_out_scale = dy2.new_empty(N, dtype=torch.float32) if back.want_out_scale else None
    if P is None:  # every column is frozen
        return dB.zero_(), d_out_scale
    tile = configs.finish_P(R)
    if N:
        with launch.on(dy2):
            finish_P_kernel[(configs.ceil_div(N, tile.BLOCK_N),)](
                P[..., first:], *(P if one is None else one.contiguous() for one in (gain, back.out_scale)), back.B,
                back.scaling if scaled else P, *(P if one is None else one for one in (dB, d_out_scale)), N, R, P.shape[2],
                *back.B.stride(), skipped, back.frozen_columns, P.shape[0], int(gain is not None), int(back.out_scale is not None),
                int(back.want_B), int(back.want_out_scale), int(scaled), 1.0 if scaled else float(back.scaling),
                **tile.blocks("BLOCK_N"), num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
    return dB, d_out_scale


def _d_core(u: torch.Tensor, back: UpProjGradSpec) -> torch.Tensor:
    """uᵀh, or its diagonal."""
    return (u.float() * back.h).sum(0) if back.core.dim() == 1 else sum_over_rows(back.h, u)


def _skipped(back: UpProjGradSpec) -> int:
    """The frozen columns of B whose gradient nobody reads."""
    return 0 if back.want_out_scale else back.frozen_columns


def _product(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    return b if a is None else a if b is None else a * b


def _side_by_side(blocks: list[torch.Tensor]) -> torch.Tensor | None:
    return (
        None
        if not blocks
        else blocks[0].contiguous()
        if len(blocks) == 1
        else torch.cat(blocks, dim=1)
    )
