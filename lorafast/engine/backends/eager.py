"""The backend in plain torch ops: exact, on any device, and what serves where no other can.

Every sum and product that could round twice runs in the accumulator's dtype or inside a GEMM.
Elementwise work on an activation goes in blocks of rows, so that no mask and no fp32 temporary has
the activation's size. Where torch has no quick GEMM in half precision, products with the base go by
panels in fp32 (half_products). lorafast.engine.backends.Backend describes the functions.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from lorafast.engine import half_products, masks, philox, row_blocks
from lorafast.engine.precision import (
    accumulator,
    apply_core,
    low_rank_grad_dtype,
    scaled_to_fp16,
)
from lorafast.engine.problem import (
    BaseTerm,
    DownProj,
    LowRankTerm,
    OutputGrads,
    Problem,
    Scaling,
    UpProj,
    UpProjGrads,
    UpProjGradSpec,
)
from lorafast.engine.row_blocks import flatten_tokens
from lorafast.runtime import devices

# Terms of a full-precision sum over tokens that are added one after another.
_SUM_ROWS = 128

# The accumulator's dtype of each activation dtype, without a call.
_WIDE = {
    dtype: accumulator(dtype)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
}

drop = masks.drop
describe_route = half_products.describe_route


def why_not(primitive: str, problem: Problem) -> tuple[str, ...]:
    return ()


def project(x: torch.Tensor, downs: list[DownProj]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    x2 = x if x.dim() == 2 else flatten_tokens(x)
    results = []
    for A, core, seed, p in downs:
        factor = A.to(x.dtype).t()
        if p:
            h = x.new_empty(x2.shape[0], A.shape[0])
            for rows in _blocks(x2):
                h[rows] = _wide_mm(masks.drop_rows(x2, rows, seed, p), factor) * philox.scale(p)
        else:
            h = torch.mm(x2, factor)
        results.append((h, h if core is None else apply_core(h, core)))
    return results


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    ups: list[UpProj],
    gain: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    keep_inner: bool = False,
    low_rank_first: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    # low_rank_first: the order of the products, if not the one that rounds least.
    if gain is not None and _is_one(gain):
        y, _ = linear(x, weight, ups, None, bias, low_rank_first=low_rank_first)
        if not keep_inner:
            return y, None
        return y, torch.sub(flatten_tokens(y), 0 if bias is None else bias.to(y.dtype))
    x2, N = x if x.dim() == 2 else flatten_tokens(x), weight.shape[0]
    y = x.new_empty(*x.shape[:-1], N)
    y2 = y.view(x2.shape[0], N)
    z = torch.empty_like(y2) if keep_inner else y2
    started = gain is None and bias is not None
    if started:
        z.copy_(bias)
    products = []
    for h_core, B, scaling, out_scale in ups:
        products.append((h_core, _scaled(B, scaling, x.dtype, out_scale).t()))
    products.append((x2, weight.to(x.dtype).t()))
    first = _rounds_often(z) if low_rank_first is None else low_rank_first
    add_products(z, products, started, first)
    if gain is not None:
        for rows in _blocks(z):
            _apply_gain(z[rows], gain, bias, y2[rows])
    return y, (z if keep_inner else None)


def grad_output(
    dy: torch.Tensor,
    specs: list[UpProjGradSpec],
    gain: torch.Tensor | None = None,
    kept: torch.Tensor | None = None,
    want_bias: bool = False,
) -> OutputGrads:
    dy2, wide = flatten_tokens(dy), _WIDE[dy.dtype]
    adapters = [_up_proj_grads(dy2, spec, gain) for spec in specs]
    d_bias = dy2.sum(0, dtype=wide) if want_bias else None
    dot = None
    if kept is not None:
        dot = torch.zeros(dy2.shape[1], dtype=wide, device=dy.device)
        kept2 = flatten_tokens(kept)
        for rows in _blocks(dy2):
            dot += (dy2[rows].to(wide) * kept2[rows]).sum(0)
    return OutputGrads(adapters, d_bias, dot)


def grad_input(bases: list[BaseTerm], low_ranks: list[LowRankTerm]) -> torch.Tensor:
    dy, K = bases[0].dy, bases[0].weight.shape[1]
    dx = dy.new_empty(*dy.shape[:-1], K)
    dx2 = flatten_tokens(dx)
    if devices.has_mixed_gemm(dy.device):
        # What is too small for fp16 here does not count in dx, which is fp16 itself.
        low_ranks = [term._replace(v=term.v.to(dy.dtype)) for term in low_ranks]
    # By blocks of rows goes what torch.addmm cannot add: masked terms, and v wider than dy.
    added = [term for term in low_ranks if term.p or term.v.dtype != dy.dtype]
    products = [
        (term.v, term.A.to(dy.dtype))
        for term in low_ranks
        if not term.p and term.v.dtype == dy.dtype
    ]
    products += map(gained_operands, bases)
    if _rounds_often(dx2):
        started = _add_low_ranks(dx2, added, started=False)
        add_products(dx2, products, started, low_rank_first=True)
    else:
        add_products(dx2, products, started=False, low_rank_first=False)
        _add_low_ranks(dx2, added, started=True)
    return dx


def grad_project(x: torch.Tensor, low_ranks: list[LowRankTerm]) -> list[torch.Tensor]:
    x2, wide, grads = flatten_tokens(x), _WIDE[x.dtype], []
    for v, A, seed, p, shared in low_ranks:
        if not p:
            grads.append(_sum_over_tokens(v, x2))
            continue
        dA = torch.zeros(A.shape, dtype=wide, device=x.device)
        for rows in _blocks(x2):
            dA += _sum_over_tokens(v[rows], masks.drop_rows(x2, rows, seed, p, shared))
        grads.append(dA.mul_(philox.scale(p)))
    return grads


def row_norm(
    weight: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    scaling: Scaling = 1.0,
    axis: str = "out",
) -> torch.Tensor:
    wide, by_row = _WIDE[weight.dtype], axis == "out"
    length = weight.shape[0 if by_row else 1]
    norm = torch.zeros(length, dtype=wide, device=weight.device)
    A = A.to(wide)
    for rows in _blocks(weight):
        part = torch.addmm(weight[rows].to(wide), B[rows].to(wide) * scaling, A)
        if by_row:
            # torch's own norm, with which PEFT starts its magnitudes: a fresh gain is exactly 1.
            torch.linalg.vector_norm(part, dim=1, out=norm[rows])
        else:
            norm += part.square_().sum(0)
    return norm if by_row else norm.sqrt_()


def add_products(
    out: torch.Tensor,
    products: list[tuple[torch.Tensor, torch.Tensor]],
    started: bool,
    low_rank_first: bool,
) -> None:
    """out = out (if started) + Σ a b over the products, given low-rank ones before the base's."""
    for a, b in products if low_rank_first else reversed(products):
        if out.dtype.itemsize == 2 and out.is_cpu and half_products.serves(a.shape[0], b):
            half_products.addmm(out if started else None, a, b, out)
        else:
            out.addmm_(a, b, beta=int(started))
        started = True


def gained_operands(base: BaseTerm) -> tuple[torch.Tensor, torch.Tensor]:
    """The operands of (gain⊙dy) W in dy's dtype, the gain rounded into the smaller one."""
    dy2, weight = flatten_tokens(base.dy), base.weight
    if weight.dtype != dy2.dtype:
        weight = weight.to(dy2.dtype)
    if base.gain is None:
        return dy2, weight
    if dy2.shape[0] < weight.shape[1]:
        return torch.mul(dy2, base.gain, out=torch.empty_like(dy2)), weight
    return dy2, torch.mul(weight, base.gain[:, None], out=torch.empty_like(weight))


def _blocks(x2: torch.Tensor) -> Iterable[slice]:
    """row_blocks, without its generator for a matrix of one block."""
    if 0 < x2.numel() <= row_blocks.CPU_ELEMENTS:
        return (slice(0, x2.shape[0]),)
    return row_blocks.row_blocks(x2)


def _scaled(
    factor: torch.Tensor,
    scaling: Scaling,
    dtype: torch.dtype,
    row_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """row_scale⊙(scaling·factor), multiplied in the accumulator's dtype, rounded once to dtype."""
    if row_scale is None and not isinstance(scaling, torch.Tensor) and scaling == 1:
        return factor.to(dtype)
    wide = factor.to(_WIDE[dtype]) * scaling
    return (wide if row_scale is None else wide.mul_(row_scale[:, None])).to(dtype)


def _rounds_often(out: torch.Tensor) -> bool:
    """True if adding to `out` product by product rounds where a GEMM's own sum would not.

    In half precision the low-rank parts go first, since each rounds relative to itself, and the
    base GEMM then rounds the sum once. In full precision the base goes first: a GEMM of few rows
    adds its terms one by one, and should start from zero rather than from a sum.
    """
    return out.dtype.itemsize == 2


def _add_low_ranks(out: torch.Tensor, low_ranks: list[LowRankTerm], started: bool) -> bool:
    """out = out (if started) + Σ mask⊙(v A); return True if out has been written."""
    for v, A, seed, p, shared in low_ranks:
        for rows in _blocks(out):
            part = _wide_mm(v[rows], A.to(v.dtype))
            if p:
                masks.add_rows(out, rows, part, seed, p, started, shared)
            else:
                out[rows] = part.add_(out[rows]) if started else part
        started = True
    return started


def _wide_mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b in the accumulator's dtype, so that a dropout scale can follow before the rounding."""
    wide = _WIDE[a.dtype]
    if a.dtype != wide and devices.has_mixed_gemm(a.device):
        return torch.mm(a, b, out_dtype=wide)
    return torch.mm(a.to(wide), b.to(wide))


def _sum_over_tokens(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """aᵀ b in the accumulator's dtype.  a [M,·], b [M,·]

    Without a mixed GEMM, as on a CPU, a bf16 result is rounded once before it is widened. A
    full-precision sum is pairwise, because a GEMM adds its terms one after another, and a long sum
    would lie far from what torch.sum makes of it. a may be fp32 beside an fp16 b.
    """
    wide, M = _WIDE[b.dtype], a.shape[0]
    if b.dtype != wide and devices.has_mixed_gemm(b.device):
        if a.dtype == b.dtype:
            return torch.mm(a.t(), b, out_dtype=wide)
        scaled, inverse = scaled_to_fp16(a)
        return torch.mm(scaled.t(), b, out_dtype=wide).mul_(inverse)
    if b.dtype == torch.float16:
        # The sum may exceed fp16's range before the scaling that brings it back.
        out = torch.zeros(a.shape[1], b.shape[1], dtype=wide, device=a.device)
        for rows in _blocks(a):
            out += _sum_over_tokens(a[rows].to(wide), b[rows].to(wide))
        return out
    if b.dtype != wide:
        return torch.mm(a.t(), b).to(wide)
    if M <= _SUM_ROWS:
        return torch.mm(a.t(), b)
    half = M // 2
    return _sum_over_tokens(a[:half], b[:half]).add_(_sum_over_tokens(a[half:], b[half:]))


def _is_one(gain: torch.Tensor) -> bool:
    """True for DoRA at its start on a CPU, which is then the frozen layer bit for bit.

    Elsewhere the answer would have to be waited for.
    """
    return gain.device.type == "cpu" and bool((gain == 1).all())


def _apply_gain(
    z: torch.Tensor, gain: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
) -> None:
    """out = gain⊙z + bias in gain's dtype, rounded once; out may be z."""
    if bias is None:
        torch.mul(z, gain, out=out)
    else:
        torch.addcmul(bias.to(gain.dtype), z, gain, out=out)


def _up_proj_grads(
    dy2: torch.Tensor, spec: UpProjGradSpec, gain: torch.Tensor | None
) -> UpProjGrads:
    """What one adapter needs of dy."""
    row_gain = spec.out_scale
    if gain is not None:
        row_gain = gain if row_gain is None else gain * row_gain
    v = dB = d_core = d_out_scale = None
    if spec.want_v or spec.want_core:
        u = _project_grad(dy2, spec, row_gain)
        if spec.want_core:
            d_core = _core_grad(u, spec)
        if spec.want_v:
            v = u if spec.core is None else _apply_core_transposed(u, spec.core)
    if spec.want_B or spec.want_out_scale:
        dB, d_out_scale = _factor_grads(dy2, spec, gain)
    return UpProjGrads(v, dB, d_core, d_out_scale)


def _project_grad(
    dy2: torch.Tensor, spec: UpProjGradSpec, row_gain: torch.Tensor | None
) -> torch.Tensor:
    """u = dy (s·row_gain⊙B)  [M,R]"""
    dtype = low_rank_grad_dtype(dy2.dtype)
    factor = _scaled(spec.B, spec.scaling, dtype, row_gain)
    if dtype == dy2.dtype:
        # Bᵀ dyᵀ rather than dy B: with the long sum along its contiguous side a BLAS sums a few
        # rows in vector lanes, not one by one.
        return torch.mm(factor.t().contiguous(), dy2.t()).t().contiguous()
    if devices.has_mixed_gemm(dy2.device):
        scaled, inverse = scaled_to_fp16(factor)
        return torch.mm(dy2, scaled, out_dtype=dtype).mul_(inverse)
    u, factor = dy2.new_empty(dy2.shape[0], factor.shape[1], dtype=dtype), factor.t().contiguous()
    for rows in _blocks(dy2):
        u[rows] = torch.mm(factor, dy2[rows].to(dtype).t()).t()
    return u


def _core_grad(u: torch.Tensor, spec: UpProjGradSpec) -> torch.Tensor:
    """uᵀh, or its diagonal; u contains s."""
    if spec.core.dim() == 1:
        return (u.to(_WIDE[u.dtype]) * spec.h).sum(0)
    return _sum_over_tokens(u, spec.h)


def _apply_core_transposed(u: torch.Tensor, core: torch.Tensor) -> torch.Tensor:
    """v = u·core"""
    return u * core.to(u.dtype) if core.dim() == 1 else torch.mm(u, core.to(u.dtype))


def _factor_grads(
    dy2: torch.Tensor, spec: UpProjGradSpec, gain: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """dB and d_out_scale, each None if not needed."""
    skipped = 0 if spec.want_out_scale else spec.frozen_columns
    h_core = apply_core(spec.h, spec.core)
    P = _sum_over_tokens(dy2, h_core[:, skipped:]) * spec.scaling
    if gain is not None:
        P *= gain[:, None]
    d_out_scale = (P * spec.B[:, skipped:]).sum(1) if spec.want_out_scale else None
    if not spec.want_B:
        return None, d_out_scale
    dB = torch.zeros(spec.B.shape, dtype=_WIDE[dy2.dtype], device=dy2.device)
    trained = P if spec.out_scale is None else P * spec.out_scale[:, None]
    dB[:, spec.frozen_columns :] = trained[:, spec.frozen_columns - skipped :]
    return dB, d_out_scale
