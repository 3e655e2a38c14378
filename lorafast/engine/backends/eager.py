"""The six primitives in plain torch: exact, on any device, with nothing saved beyond the contract. The fallback for all.

Every sum and product that could round twice runs in the accumulator's dtype or inside a GEMM's. Elementwise work on an
activation goes in panels of rows, so that a mask or an fp32 temporary never has the activation's size.
"""

from __future__ import annotations

import torch

from lorafast.engine import philox
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
    accumulator,
    tokens,
)
from lorafast.engine.reference import mix
from lorafast.engine.row_blocks import flatten_tokens, row_blocks
from lorafast.runtime import devices

_SUM_ROWS = 128

# drop(x) itself, which DoRA with dropout on both terms asks for beside the six.
dropped = philox.dropped


def why_not(primitive: str, problem: Problem) -> tuple[str, ...]:
    """Never refuses."""
    return ()


def project(x: torch.Tensor, downs: list[DownProj]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """h = drop(x) Aᵀ rounded to x's dtype, and h' = core(h).  x [...,K] -> h, h' [M,R] for each way down."""
    x2, out = flatten_tokens(x), []
    for A, core, seed, p in downs:
        if p:
            h = x.new_empty(x2.shape[0], A.shape[0])
            for rows in row_blocks(x2):
                h[rows] = _wide_mm(_unscaled(x2, rows, seed, p), A.to(x.dtype).t()) * philox.scale(
                    p
                )
        else:
            h = torch.mm(x2, A.to(x.dtype).t())
        out.append((h, mix(h, core)))
    return out


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    ups: list[UpProj],
    gain: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    keep_inner: bool = False,
    low_first: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """z = x Wᵀ + Σ h' (s·out_scale⊙B)ᵀ and y = gain⊙z + bias.  x [...,K], weight [N,K] -> y [...,N], z [M,N] or None.

    keep_inner, which needs a gain, returns z beside y. low_first: which product comes first, if not the one that rounds least.
    """
    if _is_one(gain):
        y, _ = linear(x, weight, ups, None, bias, low_first=low_first)
        z = (
            torch.sub(flatten_tokens(y), 0 if bias is None else bias.to(y.dtype))
            if keep_inner
            else None
        )
        return y, z
    x2, N = flatten_tokens(x), weight.shape[0]
    y = x.new_empty(*x.shape[:-1], N)
    y2 = y.view(x2.shape[0], N)
    z = torch.empty_like(y2) if keep_inner else y2
    started = gain is None and bias is not None
    if started:
        z.copy_(bias)
    products = [(up.mixed, _scaled(up.B, up.scaling, x.dtype, up.out_scale).t()) for up in ups]
    add_products(
        z,
        [*products, (x2, weight.to(x.dtype).t())],
        started,
        _rounds_often(z) if low_first is None else low_first,
    )
    if gain is not None:
        for rows in row_blocks(z):
            _gained(z[rows], gain, bias, y2[rows])
    return y, (z if keep_inner else None)


def grad_output(
    dy: torch.Tensor,
    returns: list[UpProjGradSpec],
    gain: torch.Tensor | None = None,
    kept: torch.Tensor | None = None,
    want_bias: bool = False,
) -> OutputGrads:
    """u = s(gain⊙out_scale⊙dy)B, v = u·core, d_core = uᵀh, dB = out_scale⊙P with P = s(gain⊙dy)ᵀh', Σdy and Σdy⊙kept.

    dy [...,N], kept [...,N] or None. Columns of dB before frozen_columns are zero and cost nothing.
    """
    dy2, sums = flatten_tokens(dy), accumulator(dy.dtype)
    adapters = [_returned(dy2, back, gain) for back in returns]
    bias = dy2.sum(0, dtype=sums) if want_bias else None
    dot = None
    if kept is not None:
        dot, kept2 = torch.zeros(dy2.shape[1], dtype=sums, device=dy.device), flatten_tokens(kept)
        for rows in row_blocks(dy2):
            dot += (dy2[rows].to(sums) * kept2[rows]).sum(0)
    return OutputGrads(adapters, bias, dot)


def grad_input(segments: list[BaseTerm], low_ranks: list[LowRankTerm]) -> torch.Tensor:
    """dx = Σ (gain⊙dy) W + Σ mask⊙(v A).  dy [...,N] -> dx [...,K]."""
    dy, K = segments[0].dy, segments[0].weight.shape[1]
    dx = dy.new_empty(*dy.shape[:-1], K)
    dx2 = dx.view(tokens(dy), K)
    masked = [low for low in low_ranks if low.p]
    products = [(v, A.to(dy.dtype)) for v, A, _, p in low_ranks if not p]
    products += map(with_gain, segments)
    if _rounds_often(dx2):
        started = _add_masked(dx2, masked, started=False)
        add_products(dx2, products, started, low_first=True)
    else:
        add_products(dx2, products, started=False, low_first=False)
        _add_masked(dx2, masked, started=True)
    return dx


def grad_project(x: torch.Tensor, low_ranks: list[LowRankTerm]) -> list[torch.Tensor]:
    """dA = vᵀ drop(x), in the accumulator's dtype.  x [...,K], v [M,R] -> [R,K] each."""
    x2, sums, out = flatten_tokens(x), accumulator(x.dtype), []
    for v, A, seed, p in low_ranks:
        if not p:
            out.append(_over_tokens(v, x2))
            continue
        dA = torch.zeros(A.shape, dtype=sums, device=x.device)
        for rows in row_blocks(x2):
            dA += _over_tokens(v[rows], _unscaled(x2, rows, seed, p))
        out.append(dA.mul_(philox.scale(p)))
    return out


def row_norm(
    weight: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    scaling: Scaling = 1.0,
    axis: str = "out",
) -> torch.Tensor:
    """‖W + sBA‖ per row (axis="out", [N]) or per column (axis="in", [K]), summed in fp32 (fp64 for fp64)."""
    sums, by_row = accumulator(weight.dtype), axis == "out"
    found = torch.zeros(weight.shape[0 if by_row else 1], dtype=sums, device=weight.device)
    A = A.to(sums)
    for rows in row_blocks(weight):
        part = torch.addmm(weight[rows].to(sums), B[rows].to(sums) * scaling, A)
        if by_row:
            # torch's own norm, by which PEFT starts its magnitudes: at the start the gain is exactly 1.
            torch.linalg.vector_norm(part, dim=1, out=found[rows])
        else:
            found += part.square_().sum(0)
    return found if by_row else found.sqrt_()


def _unscaled(x2: torch.Tensor, rows: slice, seed: torch.Tensor, p: float) -> torch.Tensor:
    """A panel of drop(x) before its scale: the dropped elements zeroed, nothing rounded."""
    return torch.where(philox.kept(seed, p, rows, x2.shape[1]), x2[rows], 0.0)


def _scaled(
    factor: torch.Tensor,
    scaling: Scaling,
    dtype: torch.dtype,
    row_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """row_scale⊙(scaling·factor), multiplied in the accumulator's dtype and rounded once to dtype."""
    if row_scale is None and not isinstance(scaling, torch.Tensor) and scaling == 1:
        return factor.to(dtype)
    wide = factor.to(accumulator(dtype)) * scaling
    return (wide if row_scale is None else wide.mul_(row_scale[:, None])).to(dtype)


def _rounds_often(out: torch.Tensor) -> bool:
    """Whether adding to `out` product by product rounds where a GEMM's own sum would not: in half precision.

    There the low-rank parts go first, since each rounds relative to itself, and the base GEMM then rounds the sum once. In full
    precision the base goes first: a GEMM of few rows adds its terms one by one, which should be to nothing rather than to a sum.
    """
    return out.dtype.itemsize == 2


def add_products(
    out: torch.Tensor,
    products: list[tuple[torch.Tensor, torch.Tensor]],
    started: bool,
    low_first: bool,
) -> None:
    """out = out (if started) + Σ a b over the products, the low-rank ones given before the base's."""
    for a, b in products if low_first else reversed(products):
        out.addmm_(a, b, beta=int(started))
        started = True


def _add_masked(out: torch.Tensor, low_ranks: list[LowRankTerm], started: bool) -> bool:
    """out = out (if started) + Σ mask⊙(v A); whether out holds something now."""
    for v, A, seed, p in low_ranks:
        for rows in row_blocks(out):
            part = _wide_mm(v[rows], A.to(out.dtype)).mul_(philox.scale(p))
            part.masked_fill_(~philox.kept(seed, p, rows, out.shape[1]), 0)
            out[rows] = part.add_(out[rows]) if started else part
        started = True
    return started


def _wide_mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b for a panel a, in the accumulator's dtype, so that a dropout scale can follow before the one rounding."""
    sums = accumulator(a.dtype)
    if a.dtype != sums and devices.has_mixed_gemm(a.device):
        return torch.mm(a, b, out_dtype=sums)
    return torch.mm(a.to(sums), b.to(sums))


def _over_tokens(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """aᵀ b, a sum over tokens, in the accumulator's dtype.  a [M,·], b [M,·]

    Without a mixed GEMM, as on a CPU, a bf16 result is rounded once before it widens. A full-precision sum goes pairwise,
    because a GEMM adds its terms one after another and a long sum would drift away from what torch.sum makes of it.
    """
    sums, M = accumulator(a.dtype), a.shape[0]
    if a.dtype != sums and devices.has_mixed_gemm(a.device):
        return torch.mm(a.t(), b, out_dtype=sums)
    if a.dtype == torch.float16:
        # The sum may pass fp16's range before the scaling that brings it back.
        out = torch.zeros(a.shape[1], b.shape[1], dtype=sums, device=a.device)
        for rows in row_blocks(a):
            out += _over_tokens(a[rows].to(sums), b[rows].to(sums))
        return out
    if a.dtype != sums:
        return torch.mm(a.t(), b).to(sums)
    if M <= _SUM_ROWS:
        return torch.mm(a.t(), b)
    return _over_tokens(a[: M // 2], b[: M // 2]).add_(_over_tokens(a[M // 2 :], b[M // 2 :]))


def _is_one(gain: torch.Tensor | None) -> bool:
    """DoRA at its start, which is then the frozen layer bit for bit. Not asked where the answer would have to be waited for."""
    return gain is not None and gain.device.type == "cpu" and bool((gain == 1).all())


def _gained(
    z: torch.Tensor, gain: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
) -> None:
    """out = gain⊙z + bias in gain's dtype, rounded once; out may be z."""
    if bias is None:
        torch.mul(z, gain, out=out)
    else:
        torch.addcmul(bias.to(gain.dtype), z, gain, out=out)


def with_gain(segment: BaseTerm) -> tuple[torch.Tensor, torch.Tensor]:
    """The two operands of (gain⊙dy) W in dy's dtype, the gain rounded into the smaller one."""
    dy2, weight = flatten_tokens(segment.dy), segment.weight.to(segment.dy.dtype)
    if segment.gain is None:
        return dy2, weight
    if dy2.shape[0] < weight.shape[1]:
        return torch.mul(dy2, segment.gain, out=torch.empty_like(dy2)), weight
    return dy2, torch.mul(weight, segment.gain[:, None], out=torch.empty_like(weight))


def _returned(dy2: torch.Tensor, back: UpProjGradSpec, gain: torch.Tensor | None) -> UpProjGrads:
    """What one adapter asked of dy."""
    sums, out_gain = accumulator(dy2.dtype), back.out_scale
    if gain is not None:
        out_gain = gain if out_gain is None else gain * out_gain
    v = dB = d_core = d_out_scale = None
    if back.want_v or back.want_core:
        # Bᵀ dyᵀ rather than dy B: with the long sum on its contiguous side a BLAS sums a few rows in lanes, not one by one.
        factor = _scaled(back.B, back.scaling, dy2.dtype, out_gain).t().contiguous()
        u = torch.mm(factor, dy2.t()).t().contiguous()
        if back.want_core:
            d_core = (
                (u.to(sums) * back.h).sum(0) if back.core.dim() == 1 else _over_tokens(u, back.h)
            )
        if back.want_v and back.core is not None:
            v = (
                u * back.core.to(u.dtype)
                if back.core.dim() == 1
                else torch.mm(u, back.core.to(u.dtype))
            )
        elif back.want_v:
            v = u
    if back.want_B or back.want_out_scale:
        frozen = 0 if back.want_out_scale else back.frozen_columns
        P = _over_tokens(dy2, mix(back.h, back.core)[:, frozen:]) * back.scaling
        if gain is not None:
            P *= gain[:, None]
        if back.want_out_scale:
            d_out_scale = (P * back.B[:, frozen:]).sum(1)
        if back.want_B:
            dB = torch.zeros(back.B.shape, dtype=sums, device=dy2.device)
            live = P if back.out_scale is None else P * back.out_scale[:, None]
            dB[:, back.frozen_columns :] = live[:, back.frozen_columns - frozen :]
    return UpProjGrads(v, dB, d_core, d_out_scale)
