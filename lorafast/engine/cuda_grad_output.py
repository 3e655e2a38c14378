"""Launches of the CUDA kernels of grad_output: what one adapter needs of dy, and the sums of dy."""

from __future__ import annotations

from typing import NamedTuple

import torch

from lorafast.engine import cuda_forms
from lorafast.engine.cuda_forms import ALIGNED, U, launch
from lorafast.engine.cuda_kernels import (
    ceil_div,
    core_strides,
    dtype_number,
    gain_operands,
    gain_tensor,
    grad_project,
    is_aligned,
    project,
    scale,
    small,
    split,
    sum_parts,
    tiles_of,
    token_factor,
)
from lorafast.engine.precision import apply_core, low_rank_grad_dtype, scaled_to_fp16
from lorafast.engine.problem import DownProj, Gain, Scaling, UpProjGrads, UpProjGradSpec

# The most ranks whose u, and whose P, one pass over dy makes; more take project and grad_project.
_U_RANKS, _P_RANKS = 16, 32
_F32 = torch.float32


class _Factor(NamedTuple):
    """s·gain⊙B, B [N,R] in fp32, as the pass over dy reads it."""

    B: torch.Tensor
    scaling: Scaling = 1.0
    gain: Gain | None = None


class _Parts(NamedTuple):
    """What a pass over dy gives, in parts; None for what was not requested."""

    u: torch.Tensor | None
    P: torch.Tensor | None
    sums: torch.Tensor | None


class _Finished(NamedTuple):
    """What parts come to; None for what was not requested."""

    u: torch.Tensor | None
    v: torch.Tensor | None
    dB: torch.Tensor | None
    d_out_scale: torch.Tensor | None
    sums: torch.Tensor | None
    gain: torch.Tensor | None
    of_gain: tuple[torch.Tensor, torch.Tensor | None] | None


class Made(NamedTuple):
    """The gradients of one adapter, and the sums [requested,N], None if there are none.

    gain and of_gain are those of OutputGrads.
    """

    grads: UpProjGrads
    sums: torch.Tensor | None
    gain: torch.Tensor | None
    of_gain: tuple[torch.Tensor, torch.Tensor | None] | None


def sums_of(dy2: torch.Tensor, kept2: torch.Tensor | None, requested: int) -> torch.Tensor:
    """Return Σ dy, and Σ dy⊙kept if two are requested.  -> [requested,N]"""
    return sum_parts(_stream(dy2, kept2, None, None, requested).sums)


def grads_of(
    dy2: torch.Tensor,
    spec: UpProjGradSpec,
    gain: Gain | None,
    kept2: torch.Tensor | None,
    requested: int,
) -> Made:
    """Return what one adapter needs. requested: as in sums_of, 0 for none."""
    dtype, R = dy2.dtype, spec.B.shape[1]
    needs_u, needs_P = spec.want_v or spec.want_core, spec.want_B or spec.want_out_scale
    skipped = 0 if spec.want_out_scale else spec.frozen_columns
    h = apply_core(spec.h, spec.core)[:, skipped:] if needs_P else None
    live = 0 if h is None else h.shape[1]
    streams_P = 0 < live <= _P_RANKS
    one_pass = needs_u and max(R, live) <= _U_RANKS and live > 0 and is_aligned(dy2)
    parts, sums = _Parts(None, None, None), None
    if requested == 2 and (dtype == _F32 or not is_aligned(dy2, kept2)):
        # Beside u and P there are no registers for Σ dy⊙kept.
        sums, requested = sums_of(dy2, kept2, requested), 0
    u_factor, inverse = None, None
    if needs_u and one_pass and _fits(spec, dtype):
        u_factor = _Factor(spec.B, spec.scaling, gain)
    elif needs_u:
        u_factor, inverse = _u_factor(spec, gain_tensor(gain), dtype, one_pass)
    if one_pass or streams_P or requested:
        parts = _stream(
            dy2, kept2, u_factor if one_pass else None, h if streams_P else None, requested
        )
    done = _Finished(*[None] * len(_Finished._fields))
    if needs_P:
        P = grad_project(dy2, h)[None] if live > _P_RANKS else parts.P
        done = _finish(parts._replace(P=P), dy2, spec, gain, skipped)
    u, v = done.u, done.v
    if needs_u and not one_pass:
        core = None if spec.core is None else spec.core.t()
        u, v = project(dy2, DownProj(u_factor.B.t(), core), low_rank_grad_dtype(dtype))
    if inverse is not None:
        u, v = u * inverse, v * inverse
    d_core = None
    if spec.want_core:
        diagonal = spec.core.dim() == 1
        d_core = (u.float() * spec.h).sum(0) if diagonal else grad_project(spec.h, u)
    if requested:
        sums = done.sums if needs_P else sum_parts(parts.sums)
    grads = UpProjGrads(v if spec.want_v else None, done.dB, d_core, done.d_out_scale)
    return Made(grads, sums, done.gain, done.of_gain)


def _fits(spec: UpProjGradSpec, dtype: torch.dtype) -> bool:
    """True if the pass over dy multiplies and rounds the factor of u."""
    return low_rank_grad_dtype(dtype) == dtype and spec.B.dtype == _F32 and spec.out_scale is None


def _u_factor(
    spec: UpProjGradSpec, gain: torch.Tensor | None, dtype: torch.dtype, one_pass: bool
) -> tuple[_Factor, torch.Tensor | None]:
    """Return a copy of s·gain⊙out_scale⊙B, and what u has to be multiplied by, or None."""
    B, scaling, out_scale = spec.B, spec.scaling, spec.out_scale
    wide = low_rank_grad_dtype(dtype)
    both = [one for one in (gain, out_scale) if one is not None]
    column_scale = torch.stack([one.float() for one in both]).prod(0) if len(both) > 1 else None
    if len(both) == 1:
        column_scale = both[0]
    # The pass over dy reads fp32, and rounds it.
    rounded = _F32 if one_pass else wide
    F, inverse = scale(B.t(), rounded, scaling=scaling, column_scale=column_scale), None
    if wide != dtype:
        F, inverse = scaled_to_fp16(F)
    return _Factor(F.t().float() if one_pass else F.t()), inverse


def _stream(
    dy2: torch.Tensor,
    kept2: torch.Tensor | None,
    factor: _Factor | None,
    h: torch.Tensor | None,
    requested: int,
) -> _Parts:
    """Make one pass over dy, for u = dy·factor, P = hᵀ dy and the sums that are requested."""
    (M, N), u_ranks = dy2.shape, 0 if factor is None else factor.B.shape[1]
    tiles = 2 if h is None else tiles_of(max(h.shape[1], u_ranks))
    aligned = is_aligned(dy2) and (requested < 2 or is_aligned(kept2))
    # Half as many blocks have twice as many warps.
    blocks = ceil_div(N, 256) if factor is None else ceil_div(N, 512)
    count, steps = split(blocks if factor is None else 2 * blocks, ceil_div(M, 16), dy2.device)
    u = P = sums = B = m = norm = tensor = None
    h_ranks, live, number = 0, 0, 1.0
    if factor is not None:
        B, scaling, (m, norm) = factor.B, factor.scaling, gain_operands(factor.gain)
        tensor = small(scaling) if isinstance(scaling, torch.Tensor) else None
        number = 1.0 if tensor is not None else float(scaling)
        u = dy2.new_empty(blocks, M, u_ranks, dtype=_F32)
    if h is not None:
        live = h.shape[1]
        h = token_factor(h, dy2.dtype, tiles)
        h_ranks = h.shape[1]
        P = dy2.new_empty(count, h_ranks, N, dtype=_F32)
    if requested:
        sums = dy2.new_empty(count, requested, N, dtype=_F32)
    flags = (u is not None) * U + aligned * ALIGNED + 4 * (P is not None)
    flags += (0, 8, 8 + 16)[requested]
    launch(
        cuda_forms.of("grad_output", dy2.dtype, tiles, flags), dy2.device,
        (blocks, count),
        dy2, kept2 if requested == 2 else None, h, m, norm, B, tensor, u, P, sums, M, *dy2.stride(),
        *((0, 0) if requested < 2 else kept2.stride()), 0 if h is None else h.stride(0),
        *((0, 0) if B is None else B.stride()), steps, N, u_ranks, h_ranks, dtype_number(tensor),
        dtype_number(m), number,
    )  # fmt: skip
    return _Parts(u, None if P is None else P[:, :live], sums)


def _finish(
    parts: _Parts,
    dy2: torch.Tensor,
    spec: UpProjGradSpec,
    gain: Gain | None,
    skipped: int,
) -> _Finished:
    """Return what parts come to; P is None if every column is frozen."""
    (M, N), R, dtype = dy2.shape, spec.B.shape[1], low_rank_grad_dtype(dy2.dtype)
    tiles, core, u, v, sums = 2, None, None, None, None
    if parts.u is not None:
        tiles, core = tiles_of(R), None if spec.core is None else small(spec.core.t())
        u = dy2.new_empty(M, R, dtype=dtype)
        v = None if core is None else torch.empty_like(u)
    if parts.sums is not None:
        sums = parts.sums.new_empty(parts.sums.shape[1:])
    dB = dy2.new_empty(N, R, dtype=_F32) if spec.want_B else None
    d_out_scale = dy2.new_empty(N, dtype=_F32) if spec.want_out_scale else None
    P = dy2.new_empty(0, 0, N, dtype=_F32) if parts.P is None else parts.P
    tensor = spec.scaling if isinstance(spec.scaling, torch.Tensor) else None
    out_scale, B, tensor = map(small, (spec.out_scale, spec.B, tensor))
    (m, norm), (own_gain, of_gain) = gain_operands(gain), _of_gain(gain, sums)
    by_gain = gain is not None and bool(gain.by_gain)
    # The parts may be some rows of wider ones.
    width = P.stride(0) // N if len(P) and N else 0
    sums_n, (u_count, sum_count) = 0, (0 if one is None else len(one) for one in parts[::2])
    if sums is not None:
        sums_n = sums.numel()
    blocks = ceil_div(N, 32) + ceil_div(sums_n, 256)
    launch(
        cuda_forms.of("grad_output_finish", dtype, tiles), dy2.device,
        (blocks if u is None else blocks + ceil_div(M, 128),),
        P, m, norm, out_scale, B, tensor, dB, d_out_scale, own_gain, *of_gain, parts.u, u, v, core,
        parts.sums, sums, *spec.B.stride(), M, *core_strides(core), sums_n, N, R, width, skipped,
        spec.frozen_columns, len(P), u_count, sum_count, int(by_gain),
        *map(dtype_number, (m, out_scale, B, tensor)), 0 if core is None else core.dim(),
        dtype_number(core), 1.0 if tensor is not None else float(spec.scaling),
    )  # fmt: skip
    made = None if of_gain[0] is None else of_gain
    return _Finished(u, u if v is None else v, dB, d_out_scale, sums, own_gain, made)


def _of_gain(
    gain: Gain | None, sums: torch.Tensor | None
) -> tuple[torch.Tensor | None, tuple[torch.Tensor | None, torch.Tensor | None]]:
    """Return where the gain goes, and the gradients of m and the norm; None: not made."""
    if gain is None or gain.norm is None:
        return None, (None, None)
    own = gain.norm.new_empty(gain.norm.shape, dtype=_F32)
    if gain.by_gain is None or sums is None or len(sums) < 2:
        return own, (None, None)
    return own, (torch.empty_like(own), torch.empty_like(own) if gain.want_norm else None)
