"""The Triton backend: the kernels in kernels/, and torch's own matrix products where these are held to be faster.

On a GPU through a driver, on CPU tensors through Triton's interpreter. Nothing here has run on a GPU yet: so it is never picked
unasked, and LORAFAST_BACKEND=triton asks for it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from lorafast.engine import philox
from lorafast.engine.backends import eager
from lorafast.engine.kernels import configs, gemm_routing, launch
from lorafast.engine.kernels import grad_output as on_output
from lorafast.engine.kernels import grad_project as on_A
from lorafast.engine.kernels import project as down
from lorafast.engine.kernels.gemm import Summand, gemm, is_many
from lorafast.engine.kernels.masked_add import masked_add
from lorafast.engine.kernels.row_norm import row_norm as norms
from lorafast.engine.kernels.scale_cast import scale_cast
from lorafast.engine.problem import (
    BaseTerm,
    DownProj,
    LowRankTerm,
    OutputGrads,
    Problem,
    Scaling,
    UpProj,
    UpProjGradSpec,
    tokens,
)
from lorafast.engine.row_blocks import flatten_tokens
from lorafast.runtime import env

ARCHS = (
    "sm_80",
    "sm_86",
    "sm_87",
    "sm_89",
    "sm_90",
    "sm_100",
    "sm_103",
    "sm_110",
    "sm_120",
    "sm_121",
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# drop(x) itself, which DoRA with dropout on both terms asks for beside the six: torch's for now.
dropped = philox.dropped


def why_not(primitive: str, problem: Problem) -> tuple[str, ...]:
    """Every reason the kernels cannot serve it."""
    vendor, name = problem.arch
    reasons = (
        []
        if env.backend() == "triton"
        else ["has not run on a GPU yet, and waits to be asked by LORAFAST_BACKEND=triton"]
    )
    if vendor == "cpu" and not env.interprets():
        reasons.append("runs on CPU tensors only in Triton's interpreter (TRITON_INTERPRET=1)")
    if vendor == "cpu" and torch.bfloat16 in (
        problem.dtype,
        problem.weight_dtype,
        problem.factor_dtype,
    ):
        reasons.append("Triton's interpreter computes bf16 wrongly")
    if vendor not in ("cpu", "nvidia"):
        reasons.append(f"is compiled for NVIDIA {', '.join(ARCHS)}; this is {vendor} {name}")
    if vendor == "nvidia" and name not in ARCHS:
        reasons.append(f"is compiled for {', '.join(ARCHS)}; this is {name}")
    if vendor == "nvidia" and triton.knobs.runtime.interpret:
        reasons.append("TRITON_INTERPRET=1 is set, and interprets kernels on CPU tensors alone")
    for what, dtype in (
        ("x", problem.dtype),
        ("weight", problem.weight_dtype),
        ("a factor", problem.factor_dtype),
    ):
        if dtype not in DTYPES:
            reasons.append(
                f"{what} is {dtype}; the kernels compute in {', '.join(map(str, DTYPES))}"
            )
    if max(problem.R) > configs.MAX_RANK:
        reasons.append(
            f"R={max(problem.R)} exceeds {configs.MAX_RANK}, the largest rank a tile holds"
        )
    return tuple(reasons)


def how(primitive: str, problem: Problem) -> str | None:
    """The route a product takes, if its tensors lie as they usually do: ours by form and tile, or torch's. None for the others."""
    K, N, e = problem.K, sum(problem.N), problem.dtype.itemsize
    if primitive not in ("linear", "grad_input"):
        return None
    columns, length = (N, K) if primitive == "linear" else (K, N)
    asked = gemm_routing.Asked(
        problem.M, columns, (length,), sum(problem.R), problem.dtype, problem.arch.name,
        by_row=problem.transposed == (primitive == "grad_input"),
        masked=primitive == "grad_input" and problem.dropout > 0 and problem.dropout_on == "adapter",
        ends=_ends(problem.gain == "out", problem.keep == "inner") if primitive == "linear" else 0,
        aligned=not any(size * e % 16 for size in (K, *problem.N)),
    )  # fmt: skip
    return str(gemm_routing.pick(asked))


def project(x: torch.Tensor, downs: list[DownProj]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """h = drop(x) Aᵀ rounded to x's dtype, and h' = core(h).  x [...,K] -> h, h' [M,R] for each way down."""
    return down.project(flatten_tokens(x), downs)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    ups: list[UpProj],
    gain: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    keep_inner: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """z = x Wᵀ + Σ h' (s·out_scale⊙B)ᵀ and y = gain⊙z + bias.  x [...,K], weight [N,K] -> y [...,N], z [M,N] or None.

    keep_inner, which needs a gain, returns z beside y.
    """
    x2, (N, K) = flatten_tokens(x), weight.shape
    M, base = x2.shape[0], Summand(x2, weight.to(x.dtype))
    ends = _ends(gain is not None, keep_inner)
    asked = _asked(M, N, [base], sum(up.B.shape[1] for up in ups), ends=ends)
    route = gemm_routing.pick(asked)
    if not route.fused or not M * N * K:
        return eager.linear(
            x,
            base.b,
            ups,
            gain,
            bias,
            keep_inner,
            None if route.fused else route.form == "low first",
        )
    y = x.new_empty(*x.shape[:-1], N)
    z = x2.new_empty(M, N) if keep_inner else None
    lows = [_Low(up.mixed, up.B, up.scaling, up.out_scale) for up in ups]
    gemm(
        y.view(M, N),
        [_dense(base), *_joined(lows, route, asked.by_row)],
        None,
        route,
        gain,
        bias,
        z,
    )
    return y, z


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
    return on_output.grad_output(
        flatten_tokens(dy), returns, gain, None if kept is None else flatten_tokens(kept), want_bias
    )


def grad_input(segments: list[BaseTerm], low_ranks: list[LowRankTerm]) -> torch.Tensor:
    """dx = Σ (gain⊙dy) W + Σ mask⊙(v A).  dy [...,N] -> dx [...,K]."""
    dy, K = segments[0].dy, segments[0].weight.shape[1]
    M, plain, dropped = (
        tokens(dy),
        [low for low in low_ranks if not low.p],
        [low for low in low_ranks if low.p],
    )
    dx = dy.new_empty(*dy.shape[:-1], K)
    dx2 = dx.view(M, K)
    bases = [Summand(a, b.t()) for a, b in map(eager.with_gain, segments)]
    asked = _asked(M, K, bases, sum(low.A.shape[0] for low in low_ranks), len(dropped), bool(plain))
    route = gemm_routing.pick(asked)
    if route.fused and M * K * min(base.a.shape[1] for base in bases):
        own, masked = (
            _joined([_Low(v, A.t(), seed=seed, p=p) for v, A, seed, p in lows], route, asked.by_row)
            for lows in (plain, dropped)
        )
        gemm(dx2, [*map(_dense, bases), *own], masked[0] if masked else None, route)
        return dx
    low_first = route.form == "low first"
    products = [(v, A.to(dy.dtype)) for v, A, _, _ in plain] + [
        (base.a, base.b.t()) for base in bases
    ]
    if low_first:
        for i, low in enumerate(dropped):
            masked_add(dx2, low, started=i > 0)
    eager.add_products(dx2, products, low_first and bool(dropped), low_first)
    if not low_first:
        for low in dropped:
            masked_add(dx2, low, started=True)
    return dx


def grad_project(x: torch.Tensor, low_ranks: list[LowRankTerm]) -> list[torch.Tensor]:
    """dA = vᵀ drop(x), in fp32.  x [...,K], v [M,R] -> [R,K] each."""
    x2 = flatten_tokens(x)
    return [on_A.grad_project(x2, low) for low in low_ranks]


def row_norm(
    weight: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    scaling: Scaling = 1.0,
    axis: str = "out",
) -> torch.Tensor:
    """‖W + sBA‖ per row (axis="out", [N]) or per column (axis="in", [K]), in fp32."""
    return norms(weight, A, B, scaling, axis)


def _ends(gains: bool, keeps_inner: bool) -> int:
    """Passes over the result that an epilogue saves."""
    return int(gains) + int(keeps_inner)


def _dense(base: Summand) -> Summand:
    """With both operands dense along an axis that a GEMM of ours reads them by."""
    a, b = base.a, base.b
    return base._replace(
        a=a if launch.dense(a, 1) else a.contiguous(),
        b=b if launch.dense(b, 1) or launch.dense(b, 0) else b.contiguous(),
    )


class _Low(NamedTuple):
    """One low-rank summand a (s·row_scale⊙F)ᵀ.  a [M,R], F [N,R]"""

    a: torch.Tensor
    F: torch.Tensor
    scaling: Scaling = 1.0
    row_scale: torch.Tensor | None = None
    seed: torch.Tensor | None = None
    p: float = 0.0


def _joined(lows: list[_Low], route: gemm_routing.Route, by_row: bool) -> list[Summand]:
    """Low-rank summands side by side as one; none if there are none.

    Padded until rows are as far apart as a descriptor wants them, or as keeps loads by pointers wide and asynchronous.
    """
    if not lows:
        return []
    dtype, multiple, (first, *more) = lows[0].a.dtype, 8 if route.form == "tma" else 16, lows
    a, b = (
        first.a,
        scale_cast(first.F, dtype, first.scaling, first.row_scale, by_row, 1 if more else multiple),
    )
    if more:
        a = torch.cat([low.a for low in lows], dim=1)
        b = torch.cat(
            [b, *(scale_cast(low.F, dtype, low.scaling, low.row_scale) for low in more)], dim=1
        )
        b = torch.nn.functional.pad(b, (0, -a.shape[1] % multiple))
    if a.shape[1] % multiple:
        a = torch.nn.functional.pad(a, (0, -a.shape[1] % multiple))
    # A parameter may lie anywhere in a storage it shares.
    by_tma = route.form == "tma"
    if not launch.dense(a, 1) or (by_tma and not launch.aligned(a)):
        a = _fresh(a)
    if not launch.dense(b, 1 if by_row else 0) or (by_tma and not launch.aligned(b)):
        b = _fresh(b, by_row)
    return [Summand(a, b, first.seed, first.p)]


def _fresh(t: torch.Tensor, by_row: bool = True) -> torch.Tensor:
    """A copy, dense along its rows or its columns."""
    return (
        t.clone(memory_format=torch.contiguous_format)
        if by_row
        else t.t().clone(memory_format=torch.contiguous_format).t()
    )


def _asked(
    M: int,
    N: int,
    bases: list[Summand],
    R: int,
    dropped: int = 0,
    plain: bool = False,
    ends: int = 0,
) -> gemm_routing.Asked:
    """What a route is chosen by. dropped: how many low-rank summands are masked; plain: whether there is one that is not."""
    first, e = bases[0], bases[0].a.itemsize
    by_row = launch.dense(first.b, 1) or not launch.dense(first.b, 0)
    # What is not dense is copied, and then lies as well as its length lets it. y and z are as long as N.
    lying = [N * e % 16 == 0]
    for a, b, *_ in bases:
        kept = launch.dense(a, 1), launch.dense(b, 1) or launch.dense(b, 0)
        lying += [
            launch.aligned(t) if dense else t.shape[1] * e % 16 == 0
            for t, dense in zip((a, b), kept, strict=True)
        ]
    alike = all(launch.dense(one.b, 1 if by_row else 0) for one in bases[1:])
    return gemm_routing.Asked(
        M, N, tuple(one.a.shape[1] for one in bases), R, first.a.dtype, launch.arch_of(first.a), by_row, dropped > 0,
        is_many(len(bases) + plain, dropped > 0), ends, all(lying), alike and dropped <= 1 and len(bases) + plain + dropped <= 4,
    )  # fmt: skip
