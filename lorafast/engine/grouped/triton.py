"""The grouped primitives by the Triton kernels, and torch's grouped product for the bases.

lorafast.engine.grouped.eager describes the functions. Each program of a kernel finds the expert of
its rows from the offsets, which the host does not read. What torch's product refuses is computed as
lorafast.engine.grouped.device does it.
"""

from __future__ import annotations

import torch

from lorafast.engine.grouped import device
from lorafast.engine.grouped.groups import Groups
from lorafast.engine.kernels import configs
from lorafast.engine.kernels.drop import drop as drop_into
from lorafast.engine.kernels.grouped_drop import grouped_drop, grouped_gain
from lorafast.engine.kernels.grouped_grad_output import grouped_grad_output
from lorafast.engine.kernels.grouped_grad_project import grouped_grad_project
from lorafast.engine.kernels.grouped_low_rank_add import grouped_low_rank_add
from lorafast.engine.kernels.grouped_project import grouped_project
from lorafast.engine.kernels.project import finish
from lorafast.engine.kernels.scale_cast import scale_cast
from lorafast.engine.precision import low_rank_grad_dtype, scaled_to_fp16
from lorafast.engine.problem import (
    BaseTerm,
    DownProj,
    LowRankTerm,
    OutputGrads,
    Scaling,
    UpProj,
    UpProjGrads,
    UpProjGradSpec,
)


def apply_core(groups: Groups, h: torch.Tensor, core: torch.Tensor | None) -> torch.Tensor:
    """Return h' = core(h) of each row's expert.  h [S,R]"""
    if core is None or core.dim() == 2:
        return device.apply_core(groups, h, core)
    return grouped_project(h, core, groups.offsets)


def drop(groups: Groups, x: torch.Tensor, seed: torch.Tensor, p: float) -> torch.Tensor:
    if groups.rows is not None:
        return grouped_drop(x, seed, p, groups.rows)
    out = x.new_empty(x.shape)
    drop_into(out, x, seed, p)
    return out


def project(
    groups: Groups, x: torch.Tensor, downs: list[DownProj]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    results = []
    for A, core, seed, p in downs:
        h = grouped_project(x, A, groups.offsets, seed, p, groups.rows)
        results.append((h, apply_core(groups, h, core)))
    return results


def linear(
    groups: Groups,
    x: torch.Tensor,
    weight: torch.Tensor,
    ups: list[UpProj],
    gain: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    keep_inner: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if not ups:
        return device.linear(groups, x, weight, ups, gain, bias, keep_inner)
    y = device.base_product(groups, x, weight.to(x.dtype).transpose(1, 2))
    z = y.new_empty(y.shape) if keep_inner else None
    for up in ups[:-1]:
        _add(groups, y, up)
    _add(groups, y, ups[-1], gain, bias, z)
    return y, z


def grad_output(
    groups: Groups,
    dy: torch.Tensor,
    specs: list[UpProjGradSpec],
    gain: torch.Tensor | None = None,
    kept: torch.Tensor | None = None,
    want_bias: bool = False,
) -> OutputGrads:
    first, *more = specs
    requested = 2 if kept is not None else int(want_bias)
    grads, sums = _up_proj_grads(groups, dy, first, gain, kept, requested)
    adapters = [grads, *(_up_proj_grads(groups, dy, spec, gain)[0] for spec in more)]
    d_bias, dot = (None, None) if sums is None else (sums[:, 0], sums[:, -1])
    return OutputGrads(adapters, d_bias if want_bias else None, None if kept is None else dot)


def grad_input(groups: Groups, bases: list[BaseTerm], low_ranks: list[LowRankTerm]) -> torch.Tensor:
    dx = None
    for dy, weight, gain in bases:
        gained = dy if gain is None else grouped_gain(dy, gain, groups.offsets)
        part = device.base_product(groups, gained, weight.to(dy.dtype))
        dx = part if dx is None else dx.add_(part)
    for v, A, seed, p, _ in low_ranks:
        # v may be fp32 beside fp16: what is too small for fp16 does not count in dx.
        grouped_low_rank_add(dx, v.to(dx.dtype), A, groups.offsets, seed, p, groups.rows)
    return dx


def grad_project(
    groups: Groups, x: torch.Tensor, low_ranks: list[LowRankTerm]
) -> list[torch.Tensor]:
    grads = []
    for v, A, seed, p, _ in low_ranks:
        # Where all experts share A, all rows are those of one expert.
        offsets = groups.offsets[:: groups.experts] if A.dim() == 2 else groups.offsets
        dA = grouped_grad_project(x, v, offsets.contiguous(), seed, p, groups.rows)
        grads.append(dA[0] if A.dim() == 2 else dA)
    return grads


def _add(
    groups: Groups,
    y: torch.Tensor,
    up: UpProj,
    gain: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    inner: torch.Tensor | None = None,
) -> None:
    """y = gain⊙(y + h' (s·out_scale⊙B)ᵀ) + bias; the sum before gain and bias goes to inner."""
    h_core, B, scaling, out_scale = up
    factor = _scaled(B, y.dtype, scaling, out_scale).transpose(-1, -2)
    grouped_low_rank_add(y, h_core, factor, groups.offsets, gain=gain, bias=bias, inner=inner)


def _up_proj_grads(
    groups: Groups,
    dy: torch.Tensor,
    spec: UpProjGradSpec,
    gain: torch.Tensor | None,
    kept: torch.Tensor | None = None,
    requested: int = 0,
) -> tuple[UpProjGrads, torch.Tensor | None]:
    """What one adapter needs of dy, and the sums, [E,requested,N]: Σ dy, and Σ dy⊙kept."""
    R, offsets, wide = spec.B.shape[-1], groups.offsets, low_rank_grad_dtype(dy.dtype)
    needs_u, needs_P = spec.want_v or spec.want_core, spec.want_B or spec.want_out_scale
    factor = inverse = u = v = d_core = None
    if needs_u:
        factor = _scaled(spec.B, wide, spec.scaling, _product(gain, spec.out_scale))
        if wide != dy.dtype:
            factor, inverse = scaled_to_fp16(factor)
    h_core = apply_core(groups, spec.h, spec.core) if needs_P else None
    one_pass = needs_u and (needs_P or requested > 0) and configs.one_pass(R, R)
    parts, dB, d_out_scale, sums = grouped_grad_output(
        dy, offsets, spec, h_core, factor if one_pass else None, gain, kept, requested
    )
    if needs_u:
        if parts is not None:
            u = finish(parts, 0, R, None, 1.0, wide)[0]
        else:
            u = grouped_project(dy, factor.transpose(-1, -2), offsets, dtype=wide)
        u = u if inverse is None else u.mul_(inverse)
    if spec.want_core:
        d_core = _core_grad(groups, u, spec)
    if spec.want_v:
        full = spec.core is not None and spec.core.dim() == 3
        v = apply_core(groups, u, spec.core.transpose(1, 2) if full else spec.core)
    if dB is not None and spec.B.dim() == 2:
        dB = dB.sum(0)
    return UpProjGrads(v, dB, d_core, d_out_scale), sums


def _core_grad(groups: Groups, u: torch.Tensor, spec: UpProjGradSpec) -> torch.Tensor:
    """uᵀh over each expert's rows, or its diagonal; u contains s.  -> [E,R,R] or [E,R]"""
    if spec.core.dim() == 2:
        return device.sums(groups, u.float() * spec.h)
    return grouped_grad_project(spec.h, u, groups.offsets)


def _scaled(
    B: torch.Tensor, dtype: torch.dtype, scaling: Scaling, scale: torch.Tensor | None
) -> torch.Tensor:
    """s·scale⊙B in dtype, dense along its rows.  B [E,N,R] or [N,R], scale [E,N]"""
    if scale is not None:
        B = B.expand(*scale.shape, B.shape[-1])
        scale = scale.reshape(-1)
    rows = B.reshape(-1, B.shape[-1])
    return scale_cast(rows, dtype, scaling, scale).view(B.shape)


def _product(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    """a⊙b, where None counts as ones."""
    if a is None or b is None:
        return b if a is None else a
    return a * b
