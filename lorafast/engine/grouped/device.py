"""The grouped primitives by torch's grouped product: on a GPU the host reads no offset.

lorafast.engine.grouped.eager describes the functions, and computes expert by expert, for which the
host has to wait, what torch's product refuses: torch_product.why_not gives the reason.
"""

from __future__ import annotations

import torch

from lorafast.engine import philox
from lorafast.engine.grouped import eager, torch_product
from lorafast.engine.grouped.groups import Groups
from lorafast.engine.precision import accumulator, low_rank_grad_dtype
from lorafast.engine.problem import (
    BaseTerm,
    DownProj,
    LowRankTerm,
    OutputGrads,
    UpProj,
    UpProjGrads,
    UpProjGradSpec,
)
from lorafast.engine.row_blocks import row_blocks

drop = eager.drop
# Columns of a factor are made a multiple of so many, which aligns the rows of every dtype.
_COLUMNS = 8


def apply_core(groups: Groups, h: torch.Tensor, core: torch.Tensor | None) -> torch.Tensor:
    """Return h' = core(h) of each row's expert.  h [S,R]"""
    if core is None or core.dim() == 2:
        return eager.apply_core(groups, h, core)
    return _product(groups, h, core.to(h.dtype).transpose(1, 2))


def project(
    groups: Groups, x: torch.Tensor, downs: list[DownProj]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    results = []
    for A, core, seed, p in downs:
        wide = A.to(accumulator(A.dtype)) * philox.scale(p) if p else A
        h = _product(groups, _masked(groups, x, seed, p), wide.to(x.dtype).transpose(-1, -2))
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
    z = base_product(groups, x, weight.to(x.dtype).transpose(1, 2))
    for h_core, B, scaling, out_scale in ups:
        factor = B.to(accumulator(x.dtype)) * scaling
        if out_scale is not None:
            factor = factor * out_scale[..., None]
        z += _product(groups, h_core, factor.to(x.dtype).transpose(-1, -2))
    if gain is None and bias is None:
        return z, z if keep_inner else None
    y = torch.empty_like(z) if keep_inner else z
    experts = groups.of_all_rows(x.shape[0])
    for rows in row_blocks(z):
        own = experts[rows]
        part = z[rows] if gain is None else z[rows] * gain[own]
        y[rows] = part if bias is None else part + bias[own]
    return y, z if keep_inner else None


def grad_output(
    groups: Groups,
    dy: torch.Tensor,
    specs: list[UpProjGradSpec],
    gain: torch.Tensor | None = None,
    kept: torch.Tensor | None = None,
    want_bias: bool = False,
) -> OutputGrads:
    adapters = [_up_proj_grads(groups, dy, spec, gain) for spec in specs]
    d_bias = sums(groups, dy) if want_bias else None
    dot = None
    if kept is not None:
        dot = sums(groups, dy.to(accumulator(dy.dtype)) * kept)
    return OutputGrads(adapters, d_bias, dot)


def grad_input(groups: Groups, bases: list[BaseTerm], low_ranks: list[LowRankTerm]) -> torch.Tensor:
    dx = None
    for dy, weight, gain in bases:
        gained = dy if gain is None else _by_rows(groups, dy, gain)
        part = base_product(groups, gained, weight.to(dy.dtype))
        dx = part if dx is None else dx.add_(part)
    for v, A, seed, p, _ in low_ranks:
        part = _product(groups, v.to(dx.dtype), A.to(dx.dtype))
        if not p:
            dx += part
            continue
        for rows in row_blocks(dx):
            mask = groups.keep_mask(seed, p, rows, dx.shape[1])
            dx[rows] += torch.where(mask, part[rows] * philox.scale(p), 0.0)
    return dx


def grad_project(
    groups: Groups, x: torch.Tensor, low_ranks: list[LowRankTerm]
) -> list[torch.Tensor]:
    grads = []
    for v, A, seed, p, _ in low_ranks:
        dA = _transposed_product(groups, v, _masked(groups, x, seed, p)) * philox.scale(p)
        grads.append(dA.sum(0) if A.dim() == 2 else dA)
    return grads


def _up_proj_grads(
    groups: Groups, dy: torch.Tensor, spec: UpProjGradSpec, gain: torch.Tensor | None
) -> UpProjGrads:
    """What one adapter needs of dy."""
    v = d_core = dB = d_out_scale = None
    B = spec.B.to(accumulator(dy.dtype))
    scale = None if gain is None else gain
    if spec.out_scale is not None:
        scale = spec.out_scale if scale is None else scale * spec.out_scale
    if spec.want_v or spec.want_core:
        factor = B * spec.scaling if scale is None else B * spec.scaling * scale[..., None]
        u = _wide_product(groups, dy, factor)
        if spec.want_core:
            d_core = _core_grad(groups, u, spec)
        if spec.want_v:
            v = u
            if spec.core is not None and spec.core.dim() == 2:
                v = u * groups.of_rows(spec.core, u.shape[0]).to(u.dtype)
            elif spec.core is not None:
                v = _wide_product(groups, u.to(dy.dtype), spec.core.to(accumulator(dy.dtype)))
    if spec.want_B or spec.want_out_scale:
        h_core = apply_core(groups, spec.h, spec.core)
        P = _transposed_product(groups, dy, h_core) * spec.scaling
        if gain is not None:
            P *= gain[..., None]
        if spec.want_out_scale:
            d_out_scale = (P * B).sum(-1)
        if spec.want_B:
            dB = P if spec.out_scale is None else P * spec.out_scale[..., None]
            dB[..., : spec.frozen_columns] = 0
            dB = dB.sum(0) if spec.B.dim() == 2 else dB
    return UpProjGrads(v, dB, d_core, d_out_scale)


def _core_grad(groups: Groups, u: torch.Tensor, spec: UpProjGradSpec) -> torch.Tensor:
    """uᵀh over each expert's rows, or its diagonal; u contains s.  -> [E,R,R] or [E,R]"""
    if spec.core.dim() == 2:
        return sums(groups, u.to(accumulator(spec.h.dtype)) * spec.h)
    return _transposed_product(groups, u, spec.h)


def _masked(groups: Groups, x: torch.Tensor, seed: torch.Tensor | None, p: float) -> torch.Tensor:
    """drop(x) before its scale, dense."""
    if not p:
        return x
    out = x.new_empty(x.shape)
    for rows in row_blocks(x):
        mask = groups.keep_mask(seed, p, rows, x.shape[1])
        torch.where(mask, x[rows], x.new_zeros(()), out=out[rows])
    return out


def _by_rows(groups: Groups, x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    """gain⊙x with each row's expert's gain, rounded once."""
    out, experts = x.new_empty(x.shape), groups.of_all_rows(x.shape[0])
    for rows in row_blocks(x):
        out[rows] = x[rows] * gain[experts[rows]]
    return out


def base_product(groups: Groups, a: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Each row of a [S,P] times its expert's weight [E,P,Q], which is not copied.  -> [S,Q]"""
    if torch_product.why_not(a, weight):
        return eager.products(groups, a, weight)
    return torch_product.product(groups, a, weight)


def _product(groups: Groups, a: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Each row of a [S,P] times its expert's factor [E,P,Q], or times one [P,Q].  -> [S,Q]"""
    if factor.dim() == 2:
        return torch.mm(a, factor)
    P, Q = factor.shape[1:]
    if torch_product.why_not(a, factor):
        a, factor = _padded(a, -P % _COLUMNS), _padded(factor, -Q % _COLUMNS, -P % _COLUMNS)
    return base_product(groups, a, factor)[:, :Q].contiguous()


def _wide_product(groups: Groups, a: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """a times factor, in the dtype that gradients of h have beside a: fp32 for fp16."""
    dtype = low_rank_grad_dtype(a.dtype)
    return _product(groups, a.to(dtype), factor.to(dtype))


def _transposed_product(groups: Groups, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """aᵀb over each expert's rows, in the accumulator's dtype.  a [S,P], b [S,Q] -> [E,P,Q]"""
    wide, P, Q = accumulator(b.dtype), a.shape[1], b.shape[1]
    if b.dtype == torch.float16:
        # The sum may exceed its range.
        a, b = a.to(wide), b.to(wide)
    if torch_product.why_not(a, b):
        a, b = _padded(a, -P % _COLUMNS), _padded(b, -Q % _COLUMNS)
    if torch_product.why_not(a, b):
        like = b.new_empty(groups.experts, P, Q)
        (sums,) = eager.grad_project(groups, b, [LowRankTerm(a, like)])
    else:
        sums = torch_product.transposed_product(groups, a, b).to(wide)
    return sums[:, :P, :Q]


def _padded(operand: torch.Tensor, columns: int, rows: int = 0) -> torch.Tensor:
    """The operand with so many more columns, and rows of a factor, of zeros; dense."""
    if columns or rows:
        return torch.nn.functional.pad(operand, (0, columns, 0, rows))
    return operand.contiguous()


def sums(groups: Groups, x: torch.Tensor) -> torch.Tensor:
    """The sum of each expert's rows, in the accumulator's dtype.  x [S,P] -> [E,P]"""
    wide = x.to(accumulator(x.dtype))
    offsets = groups.offsets.to(torch.int64)
    return torch.segment_reduce(wide, "sum", offsets=offsets, axis=0, unsafe=True, initial=0)
