"""Launches of the CUDA kernels of grad_output on the emulator, one adapter at a time.

See helpers.cuda_launches; a launcher would put several adapters side by side.
"""

from __future__ import annotations

import torch

from helpers import cuda_launches
from helpers.cuda_compiler import ALIGNED, Form
from helpers.cuda_launches import (
    dtype_number,
    form_of,
    is_aligned,
    launch,
    scale,
    sum_over_tokens,
    sum_parts,
    tiles_of,
    token_factor,
    up_to,
)
from lorafast.engine.kernels.configs import ceil_div
from lorafast.engine.precision import apply_core, low_rank_grad_dtype, scaled_to_fp16
from lorafast.engine.problem import DownProj, OutputGrads, UpProjGrads, UpProjGradSpec
from lorafast.engine.row_blocks import flatten_tokens

# The ranks whose u is computed in the same pass, and those of P.
U_RANKS, P_RANKS = 16, 32


def grad_output(
    dy: torch.Tensor,
    specs: list[UpProjGradSpec],
    gain: torch.Tensor | None = None,
    kept: torch.Tensor | None = None,
    want_bias: bool = False,
) -> OutputGrads:
    """Return what the adapters request of dy, Σ dy and Σ dy⊙kept."""
    dy2 = flatten_tokens(dy)
    kept2 = None if kept is None else flatten_tokens(kept)
    adapters, sums = [], None
    requested = 2 if kept2 is not None else int(want_bias)
    for spec in specs:
        grads, parts = _pass(dy2, spec, gain, kept2, requested)
        adapters.append(grads)
        sums, requested = (parts, 0) if requested else (sums, 0)
    if requested:
        *_, parts = _stream(dy2, kept2, None, None, requested)
        sums = sum_parts(parts)
    return OutputGrads(adapters, sums[0] if want_bias else None, None if kept2 is None else sums[1])


def _pass(dy2, spec, gain, kept2, requested):
    """Return the gradients of one adapter, and the sums [requested,N] or None."""
    dtype = dy2.dtype
    needs_u, needs_P = spec.want_v or spec.want_core, spec.want_B or spec.want_out_scale
    skipped = 0 if spec.want_out_scale else spec.frozen_columns
    F, inverse = _factor(spec, gain, dtype) if needs_u else (None, None)
    h = apply_core(spec.h, spec.core)[:, skipped:] if needs_P else None
    live, R = 0 if h is None else h.shape[1], spec.B.shape[1]
    streams_P = 0 < live <= P_RANKS
    one_pass = needs_u and max(R, live) <= U_RANKS and live > 0 and is_aligned(dy2)
    core = None if spec.core is None else spec.core.t()
    u_parts = P_parts = parts = None
    if requested == 2 and (dtype == torch.float32 or not is_aligned(dy2, kept2)):
        # Beside u and P there are no registers for Σ dy⊙kept.
        *_, parts = _stream(dy2, kept2, None, None, requested)
        requested = 0
    if one_pass or streams_P or requested:
        u_parts, P_parts, own_parts = _stream(
            dy2, kept2, F if one_pass else None, h if streams_P else None, requested
        )
        parts = own_parts if requested else parts
    if live > P_RANKS:
        P_parts = sum_over_tokens(dy2, h)[None]
    u = v = None
    if one_pass:
        u, v = cuda_launches.finish(u_parts, core, 1.0, low_rank_grad_dtype(dtype))
    elif needs_u:
        u, v = cuda_launches.project_one(dy2, DownProj(F, core), low_rank_grad_dtype(dtype))
    if inverse is not None:
        u, v = u * inverse, v * inverse
    dB, d_out_scale = _finish_P(P_parts, spec, gain, skipped) if needs_P else (None, None)
    d_core = None
    if spec.want_core:
        diagonal = spec.core.dim() == 1
        d_core = (u.float() * spec.h).sum(0) if diagonal else sum_over_tokens(spec.h, u)
    sums = None if parts is None else sum_parts(parts)
    return UpProjGrads(v if spec.want_v else None, dB, d_core, d_out_scale), sums


def _factor(spec, gain, dtype):
    """Return (s·gain⊙out_scale⊙B)ᵀ [R,N] in dtype, and what u has to be multiplied by, or None."""
    both = [one for one in (gain, spec.out_scale) if one is not None]
    column_scale = torch.stack([one.float() for one in both]).prod(0) if both else None
    wide = low_rank_grad_dtype(dtype)
    F = scale(spec.B.t(), wide, scaling=spec.scaling, column_scale=column_scale)
    return (F, None) if wide == dtype else scaled_to_fp16(F)


def _stream(dy2, kept2, F, h, requested):
    """Return the parts of u, P and the sums; None for what is not asked for."""
    (M, N), splits = dy2.shape, cuda_launches.splits
    tiles = 2 if h is None else tiles_of(max(h.shape[1], 0 if F is None else F.shape[0]))
    aligned = is_aligned(dy2) and (requested < 2 or is_aligned(kept2))
    u = P = sums = None
    u_ranks = h_ranks = live = 0
    if F is not None:
        u_ranks = F.shape[0]
        F, u = scale(F, dy2.dtype, 16, up_to(N, 64)), torch.empty(ceil_div(N, 256), M, u_ranks)
    if h is not None:
        live = h.shape[1]
        h = token_factor(h, dy2.dtype, tiles)
        h_ranks = h.shape[1]
        P = torch.empty(splits, h_ranks, N)
    if requested:
        sums = torch.empty(splits, requested, N)
    flags = (u is not None) + aligned * ALIGNED + 4 * (P is not None)
    flags += (0, 8, 8 + 16)[requested]
    launch(
        form_of("grad_output", dy2.dtype, tiles, flags), (ceil_div(N, 256), splits),
        dy2, kept2 if requested == 2 else None, h, F, u, P, sums, M, *dy2.stride(),
        *((0, 0) if requested < 2 else kept2.stride()), 0 if h is None else h.stride(0),
        0 if F is None else F.stride(0), ceil_div(ceil_div(M, 16), splits), N, u_ranks, h_ranks,
    )  # fmt: skip
    return u, None if P is None else P[:, :live], sums


def _finish_P(parts, spec, gain, skipped):
    """Return dB and d_out_scale.  parts [splits,·,N], or None if every column is frozen"""
    N, R = spec.B.shape
    dB = torch.empty(N, R) if spec.want_B else None
    d_out_scale = torch.empty(N) if spec.want_out_scale else None
    if parts is None:
        parts = torch.empty(0, 0, N)
    tensor = spec.scaling if isinstance(spec.scaling, torch.Tensor) else None
    optional = (gain, spec.out_scale, spec.B, tensor)
    # The parts may be some rows of wider ones.
    width = parts.stride(0) // max(N, 1) if len(parts) else 0
    launch(
        Form("grad_output_finish", "fp32"), (ceil_div(N, 32),),
        parts, *optional, dB, d_out_scale, *spec.B.stride(), N, R, width, skipped,
        spec.frozen_columns, len(parts), *map(dtype_number, optional),
        1.0 if tensor is not None else float(spec.scaling),
    )  # fmt: skip
    return dB, d_out_scale
