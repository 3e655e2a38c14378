"""The grouped primitives in plain torch ops: expert by expert, with the ops of a single layer.

Each function takes the groups first, and then what the function of the same name of
lorafast.engine.backends.Backend takes, with a leading dim for the experts on weights, factors,
gains and biases. A factor without one is that of all experts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from lorafast.engine import philox
from lorafast.engine.backends import eager
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


def apply_core(groups: Groups, h: torch.Tensor, core: torch.Tensor | None) -> torch.Tensor:
    """Return h' = core(h) of each row's expert.  h [S,R]"""
    if core is None:
        return h
    if core.dim() == 2:
        return h * groups.of_rows(core, h.shape[0]).to(h.dtype)
    return products(groups, h, core.to(h.dtype).transpose(1, 2))


def products(groups: Groups, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return row i of a [S,P] times the matrix of its expert in b [E,P,Q], for all i.  -> [S,Q]"""
    out = a.new_empty(a.shape[0], b.shape[2])
    for e, rows in groups.slices():
        torch.mm(a[rows], b[e], out=out[rows])
    return out


def project(
    groups: Groups, x: torch.Tensor, downs: list[DownProj]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    results = []
    for A, core, seed, p in downs:
        h = x.new_empty(x.shape[0], A.shape[-2])
        wide = A.to(accumulator(A.dtype)) * philox.scale(p) if p else A
        for e, rows in groups.slices():
            kept = _masked(groups, x, rows, seed, p)
            h[rows] = eager.project(kept, [DownProj(_of(wide, e, 2))])[0][0]
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
    y = x.new_empty(x.shape[0], weight.shape[1])
    z = torch.empty_like(y) if keep_inner else None
    for e, rows in groups.slices():
        own = [
            UpProj(h_core[rows], _of(B, e, 2), scaling, _of(out_scale, e, 1))
            for h_core, B, scaling, out_scale in ups
        ]
        result, inner = eager.linear(
            x[rows], weight[e], own, _of(gain, e, 1), _of(bias, e, 1), keep_inner
        )
        y[rows] = result
        if z is not None:
            z[rows] = inner
    return y, z


def grad_output(
    groups: Groups,
    dy: torch.Tensor,
    specs: list[UpProjGradSpec],
    gain: torch.Tensor | None = None,
    kept: torch.Tensor | None = None,
    want_bias: bool = False,
) -> OutputGrads:
    wide, N = accumulator(dy.dtype), dy.shape[1]
    d_bias = dy.new_zeros(groups.experts, N, dtype=wide) if want_bias else None
    dot = None if kept is None else dy.new_zeros(groups.experts, N, dtype=wide)
    made = [_UpProjGrads(groups, dy, spec, wide) for spec in specs]
    for e, rows in groups.slices():
        own = [
            spec._replace(
                B=_of(spec.B, e, 2), out_scale=_of(spec.out_scale, e, 1),
                core=None if spec.core is None else spec.core[e],
                h=None if spec.h is None else spec.h[rows],
            )
            for spec in specs
        ]  # fmt: skip
        sums = eager.grad_output(
            dy[rows], own, _of(gain, e, 1), None if kept is None else kept[rows], want_bias
        )
        for all_experts, of_one in zip(made, sums.adapters, strict=True):
            all_experts.add(e, rows, of_one)
        if d_bias is not None:
            d_bias[e] = sums.d_bias
        if dot is not None:
            dot[e] = sums.dot
    return OutputGrads([grads.result() for grads in made], d_bias, dot)


def grad_input(groups: Groups, bases: list[BaseTerm], low_ranks: list[LowRankTerm]) -> torch.Tensor:
    dy = bases[0].dy
    dx = dy.new_empty(dy.shape[0], bases[0].weight.shape[2])
    for e, rows in groups.slices():
        own = [BaseTerm(base.dy[rows], base.weight[e], _of(base.gain, e, 1)) for base in bases]
        terms = [LowRankTerm(term.v[rows], _of(term.A, e, 2)) for term in low_ranks if not term.p]
        dx[rows] = eager.grad_input(own, terms)
        for v, A, seed, p, _ in low_ranks:
            if p:
                part = eager.grad_input(
                    [BaseTerm(v[rows].to(accumulator(v.dtype)), _of(A, e, 2))], []
                )
                _add_masked(groups, dx, rows, part, seed, p)
    return dx


def grad_project(
    groups: Groups, x: torch.Tensor, low_ranks: list[LowRankTerm]
) -> list[torch.Tensor]:
    wide, grads = accumulator(x.dtype), []
    for v, A, seed, p, _ in low_ranks:
        dA = x.new_zeros(A.shape, dtype=wide)
        for e, rows in groups.slices():
            kept = _masked(groups, x, rows, seed, p)
            (grad,) = eager.grad_project(kept, [LowRankTerm(v[rows], _of(A, e, 2))])
            _of(dA, e, 2).add_(grad)
        grads.append(dA.mul_(philox.scale(p)) if p else dA)
    return grads


def drop(groups: Groups, x: torch.Tensor, seed: torch.Tensor, p: float) -> torch.Tensor:
    out = x.new_empty(x.shape)
    for rows in row_blocks(x):
        mask = groups.keep_mask(seed, p, rows, x.shape[1])
        out[rows] = torch.where(mask, x[rows] * philox.scale(p), 0.0)
    return out


class _UpProjGrads:
    """What one adapter needs of dy, filled expert by expert."""

    def __init__(
        self, groups: Groups, dy: torch.Tensor, spec: UpProjGradSpec, wide: torch.dtype
    ) -> None:
        S, E, N, R = dy.shape[0], groups.experts, dy.shape[1], spec.B.shape[-1]
        zeros: Callable = dy.new_zeros
        v = zeros(S, R, dtype=low_rank_grad_dtype(dy.dtype)) if spec.want_v else None
        core = zeros(spec.core.shape, dtype=wide) if spec.want_core else None
        dB = zeros(spec.B.shape, dtype=wide) if spec.want_B else None
        out_scale = zeros(E, N, dtype=wide) if spec.want_out_scale else None
        self._grads = UpProjGrads(v, dB, core, out_scale)

    def add(self, expert: int, rows: slice, own: UpProjGrads) -> None:
        """Add one expert's."""
        if self._grads.v is not None:
            self._grads.v[rows] = own.v
        # The gradient of a factor that all experts share is their sum.
        for mine, theirs, dims in zip(self._grads[1:], own[1:], (2, None, 1), strict=True):
            if mine is not None:
                (mine[expert] if dims is None else _of(mine, expert, dims)).add_(theirs)

    def result(self) -> UpProjGrads:
        return self._grads


def _of(tensor: torch.Tensor | None, expert: int, dims: int) -> torch.Tensor | None:
    """An expert's part of a tensor, or the tensor if all share it: it has so many dims."""
    return tensor if tensor is None or tensor.dim() == dims else tensor[expert]


def _masked(
    groups: Groups, x: torch.Tensor, rows: slice, seed: torch.Tensor | None, p: float
) -> torch.Tensor:
    """Rows of drop(x) before its scale."""
    if not p:
        return x[rows]
    return torch.where(groups.keep_mask(seed, p, rows, x.shape[1]), x[rows], 0.0)


def _add_masked(
    groups: Groups, out: torch.Tensor, rows: slice, part: torch.Tensor, seed: torch.Tensor, p: float
) -> None:
    """Add mask⊙part·scale, part in the accumulator's dtype, to rows of out."""
    mask = groups.keep_mask(seed, p, rows, out.shape[1])
    torch.where(mask, part, part.new_zeros(()), out=part)
    out[rows] = torch.add(out[rows], part, alpha=philox.scale(p))
