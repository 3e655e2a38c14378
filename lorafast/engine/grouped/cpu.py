"""The grouped primitives in C++ for CPU tensors: torch's product for each expert's base, and one
pass of csrc/cpu over all rows for what is added to it.

lorafast.engine.grouped.eager describes the functions. An expert's rows go through the kernel of one
layer; experts are shared among the threads.
"""

from __future__ import annotations

import torch

from lorafast.engine import half_products, philox
from lorafast.engine.backends import cpu
from lorafast.engine.grouped import eager, torch_product
from lorafast.engine.grouped.groups import Groups
from lorafast.engine.precision import low_rank_grad_dtype
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

apply_core = eager.apply_core
drop = eager.drop


def project(
    groups: Groups, x: torch.Tensor, downs: list[DownProj]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    x = cpu.dense_rows(x)
    return [_project(groups, x, A, seed, p, core) for A, core, seed, p in downs]


def linear(
    groups: Groups,
    x: torch.Tensor,
    weight: torch.Tensor,
    ups: list[UpProj],
    gain: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    keep_inner: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    gemm_bias, last_bias = (bias, None) if gain is None else (None, bias)
    y = _products(groups, x, weight.to(x.dtype).transpose(1, 2), gemm_bias)
    z = torch.empty_like(y) if keep_inner else None
    if ups:
        *others, last = ups
        for up in others:
            _add(groups, up.h_core, up.B, y, up.scaling, up.out_scale)
        h_core, B, scaling, out_scale = last
        _add(groups, h_core, B, y, scaling, out_scale, gain=gain, bias=last_bias, inner=z)
    return y, z


def grad_output(
    groups: Groups,
    dy: torch.Tensor,
    specs: list[UpProjGradSpec],
    gain: torch.Tensor | None = None,
    kept: torch.Tensor | None = None,
    want_bias: bool = False,
) -> OutputGrads:
    dy, gain = cpu.dense_rows(dy), cpu.dense_fp32(gain)
    shape = groups.experts, dy.shape[1]
    d_bias = torch.empty(shape, dtype=torch.float32) if want_bias else None
    dot = None if kept is None else torch.empty(shape, dtype=torch.float32)
    kept = None if kept is None else cpu.dense_rows(kept)
    first, *more = specs
    adapters = [_up_proj_grads(groups, dy, first, gain, d_bias, kept, dot)]
    adapters += [_up_proj_grads(groups, dy, spec, gain) for spec in more]
    return OutputGrads(adapters, d_bias, dot)


def grad_input(groups: Groups, bases: list[BaseTerm], low_ranks: list[LowRankTerm]) -> torch.Tensor:
    first, *more = bases
    dx = _base_grad(groups, first)
    for base in more:
        dx += _base_grad(groups, base)
    for v, A, seed, p, _ in low_ranks:
        _add(groups, v, A.transpose(-1, -2), dx, seed=seed, p=p)
    return dx


def grad_project(
    groups: Groups, x: torch.Tensor, low_ranks: list[LowRankTerm]
) -> list[torch.Tensor]:
    x, grads = cpu.dense_rows(x), []
    for v, A, seed, p, _ in low_ranks:
        dA = _grad_project(groups, x, v, seed, p)
        grads.append(dA.sum(0) if A.dim() == 2 else dA)
    return grads


def _products(
    groups: Groups, a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Each row of a [S,P] times its expert's b [E,P,Q], plus its bias [E,Q].  -> [S,Q], dense"""
    a, half = _multiplied(a), a.dtype is not torch.float32
    by_panels = half and half_products.serves(max(1, a.shape[0] // groups.experts), b[0])
    if bias is None and not by_panels and not torch_product.why_not(a, b):
        return torch_product.product(groups, a, b)
    out = a.new_empty(a.shape[0], b.shape[2])
    for e, rows in groups.slices():
        own_bias = None if bias is None else bias[e].to(a.dtype)
        _multiply(a[rows], b[e], out[rows], own_bias)
    return out


def _base_grad(groups: Groups, base: BaseTerm) -> torch.Tensor:
    """(gain⊙dy) W of each row's expert.  -> [S,K]"""
    dy, weight, gain = base
    if gain is None:
        return _products(groups, dy, weight.to(dy.dtype))
    # An expert at a time, so that gain⊙dy is in the cache, and never in memory as a whole.
    dx = dy.new_empty(dy.shape[0], weight.shape[2])
    for e, rows in groups.slices():
        own = cpu.gained_operands(BaseTerm(dy[rows], weight[e], gain[e]))
        _multiply(*own, dx[rows], None)
    return dx


def _multiply(
    a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None
) -> None:
    """out = a b + bias."""
    if out.dtype is not torch.float32 and half_products.serves(a.shape[0], b):
        half_products.addmm(bias, a, b, out)
    elif bias is None:
        torch.mm(a, b, out=out)
    else:
        torch.addmm(bias, a, b, out=out)


def _multiplied(rows: torch.Tensor) -> torch.Tensor:
    """An operand of torch's products."""
    if rows.shape[1] % cpu.AMX_ROW and rows.dtype is torch.bfloat16:
        return rows.contiguous()
    return rows


def _project(
    groups: Groups,
    x: torch.Tensor,
    A: torch.Tensor,
    seed: torch.Tensor | None = None,
    p: float = 0.0,
    core: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """h = drop(x) Aᵀ and h' = core(h) of each row's expert, both rounded once.  -> [S,R]"""
    (S, K), R = x.shape, A.shape[-2]
    h = h_core = x.new_empty(S, R)
    A, A_arguments = _factor(A)
    core_arguments: tuple[int, ...] = (0, 0, 0, 0, 0, 0)
    if core is not None and core.dim() == 3:
        core, given = _factor(core)
        h_core = torch.empty_like(h)
        core_arguments = (*given, h_core.data_ptr())
    cpu.library().grouped_project(
        cpu.TYPES[x.dtype], x.data_ptr(), K, x.stride(0), R, *A_arguments,
        *_dropout(seed, p), h.data_ptr(), *core_arguments, *_of_groups(groups, S * K * R),
    )  # fmt: skip
    if core is not None and core.dim() == 2:
        h_core = apply_core(groups, h, core)
    return h, h_core


def _add(
    groups: Groups,
    h: torch.Tensor,
    factor: torch.Tensor,
    out: torch.Tensor,
    scaling: Scaling = 1.0,
    scale: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
    p: float = 0.0,
    gain: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    inner: torch.Tensor | None = None,
) -> None:
    """out = gain⊙(out + mask⊙(h (scaling·scale⊙factor)ᵀ)) + bias, with each row's expert's.

    h [S,R], factor [E,N,R] or [N,R], out [S,N], dense. The sum before gain and bias goes to inner.
    """
    (S, N), R = out.shape, h.shape[1]
    h = cpu.dense_rows(h)
    factor, (address, kind, of_expert, along_N, along_R) = _factor(factor)
    vectors = [cpu.dense_fp32(vector) for vector in (scale, gain, bias)]
    scale_at, gain_at, bias_at = (0 if vector is None else vector.data_ptr() for vector in vectors)
    cpu.library().grouped_low_rank_add(
        cpu.TYPES[out.dtype], cpu.TYPES[h.dtype], h.data_ptr(), h.stride(0), N, R,
        address, kind, of_expert, along_R, along_N, float(scaling), scale_at,
        *_dropout(seed, p), gain_at, bias_at, 0 if inner is None else inner.data_ptr(),
        out.data_ptr(), *_of_groups(groups, S * N * R),
    )  # fmt: skip


def _grad_project(
    groups: Groups,
    x: torch.Tensor,
    v: torch.Tensor,
    seed: torch.Tensor | None = None,
    p: float = 0.0,
) -> torch.Tensor:
    """vᵀ drop(x) over each expert's rows, in fp32.  v [S,R] -> [E,R,K]"""
    (S, K), R, v = x.shape, v.shape[1], cpu.dense_rows(v.to(low_rank_grad_dtype(x.dtype)))
    out = torch.empty(groups.experts, R, K, dtype=torch.float32)
    cpu.library().grouped_grad_project(
        cpu.TYPES[x.dtype], x.data_ptr(), K, x.stride(0), v.data_ptr(), R, v.stride(0),
        *_dropout(seed, p), out.data_ptr(), *_of_groups(groups, S * K * R),
    )  # fmt: skip
    return out


def _up_proj_grads(
    groups: Groups,
    dy: torch.Tensor,
    spec: UpProjGradSpec,
    gain: torch.Tensor | None,
    d_bias: torch.Tensor | None = None,
    kept: torch.Tensor | None = None,
    dot: torch.Tensor | None = None,
) -> UpProjGrads:
    """What one adapter needs of dy; d_bias and dot are filled where they are given."""
    (S, N), R = dy.shape, spec.B.shape[-1]
    u = None
    if spec.want_v or spec.want_core:
        u = torch.empty(S, R, dtype=low_rank_grad_dtype(dy.dtype))
    P, h_core, columns = None, None, 0
    if spec.want_B or spec.want_out_scale:
        skipped = 0 if spec.want_out_scale else spec.frozen_columns
        columns = R - skipped
        make = torch.zeros if skipped else torch.empty
        P = make(groups.experts, N, R, dtype=torch.float32)
        h_core = cpu.dense_rows(apply_core(groups, spec.h, spec.core))
    # The factor has to live until the call.
    _B, (address, kind, of_expert, along_N, along_R) = _factor(spec.B)
    scale = cpu.dense_fp32(spec.out_scale)
    offsets, experts, _, threads = _of_groups(groups, S * N * R)
    cpu.library().grouped_grad_output(
        cpu.TYPES[dy.dtype], dy.data_ptr(), N, dy.stride(0), R,
        address, kind, of_expert, along_R, along_N, float(spec.scaling),
        0 if gain is None else gain.data_ptr(),
        0 if scale is None else scale.data_ptr(),
        0 if u is None else u.data_ptr(),
        0 if h_core is None else h_core.data_ptr(), h_core.stride(0) if columns else 0, columns,
        0 if P is None else P.data_ptr(),
        0 if d_bias is None else d_bias.data_ptr(),
        0 if kept is None else kept.data_ptr(), 0 if kept is None else kept.stride(0),
        0 if dot is None else dot.data_ptr(), offsets, experts, threads,
    )  # fmt: skip
    d_core = None
    if spec.want_core:
        d_core = _core_grad(groups, u, spec)
    return UpProjGrads(
        _apply_core_transposed(groups, u, spec.core) if spec.want_v else None,
        _B_grad(P, spec) if spec.want_B else None,
        d_core,
        (P * spec.B).sum(-1) if spec.want_out_scale else None,
    )


def _apply_core_transposed(
    groups: Groups, u: torch.Tensor, core: torch.Tensor | None
) -> torch.Tensor:
    """v = u·core of each row's expert."""
    if core is None or core.dim() == 2:
        return apply_core(groups, u, core)
    return _project(groups, u, core.transpose(1, 2))[0]


def _core_grad(groups: Groups, u: torch.Tensor, spec: UpProjGradSpec) -> torch.Tensor:
    """uᵀh over each expert's rows, or its diagonal; u contains s.  -> [E,R,R] or [E,R]"""
    if spec.core.dim() == 3:
        return _grad_project(groups, cpu.dense_rows(spec.h), u)
    d_core = torch.zeros(spec.core.shape, dtype=torch.float32)
    products = u.float() * spec.h
    for e, rows in groups.slices():
        torch.sum(products[rows], 0, out=d_core[e])
    return d_core


def _B_grad(P: torch.Tensor, spec: UpProjGradSpec) -> torch.Tensor:
    """out_scale⊙P with its frozen columns zero, summed over experts that share B."""
    dB = P if spec.out_scale is None else P * spec.out_scale[..., None]
    if spec.want_out_scale and spec.frozen_columns:
        dB[..., : spec.frozen_columns] = 0
    return dB.sum(0) if spec.B.dim() == 2 else dB


def _factor(factor: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    """A factor as the kernels read it, its address, type and strides: of an expert, row, column."""
    if factor.dtype not in cpu.TYPES:
        factor = factor.float()
    strides = factor.stride() if factor.dim() == 3 else (0, *factor.stride())
    return factor, (factor.data_ptr(), cpu.TYPES[factor.dtype], *strides)


def _dropout(seed: torch.Tensor | None, p: float) -> tuple[int, int]:
    """The seed's address and the threshold."""
    return (seed.data_ptr(), philox.threshold(p)) if p else (0, 0)


def _of_groups(groups: Groups, work: int) -> tuple[int, int, int, int]:
    """The last arguments of an entry point: offsets, experts, rows, threads."""
    rows = 0 if groups.rows is None else groups.rows.data_ptr()
    return groups.offsets.data_ptr(), groups.experts, rows, cpu.threads(work)
