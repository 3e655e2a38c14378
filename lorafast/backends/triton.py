"""The Triton backend: the kernels in kernels/, and torch's own matrix products where these are held to be faster.

On a GPU through a driver, on CPU tensors through Triton's interpreter. Nothing here has run on a GPU yet: so it is never picked
unasked, and LORAFAST_BACKEND=triton asks for it.
"""

from __future__ import annotations

import torch
import triton

from lorafast import env
from lorafast.backends import eager
from lorafast.kernels import configs, launch, routes
from lorafast.kernels import grad_output as on_output
from lorafast.kernels import grad_project as on_A
from lorafast.kernels import project as down
from lorafast.kernels.factor import factor
from lorafast.kernels.gemm import Summand, gemm
from lorafast.kernels.masked_add import masked_add
from lorafast.kernels.row_norm import row_norm as norms
from lorafast.panels import flat
from lorafast.problem import Down, LowRank, OutputGrads, Problem, Return, Scaling, Segment, Up, tokens

ARCHS = ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_103", "sm_110", "sm_120", "sm_121")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def why_not(primitive: str, problem: Problem) -> tuple[str, ...]:
    """Every reason the kernels cannot serve it."""
    vendor, name = problem.arch
    reasons = [] if env.backend() == "triton" else ["has not run on a GPU yet, and waits to be asked by LORAFAST_BACKEND=triton"]
    if vendor == "cpu" and not env.interprets():
        reasons.append("runs on CPU tensors only in Triton's interpreter (TRITON_INTERPRET=1)")
    if vendor == "cpu" and torch.bfloat16 in (problem.dtype, problem.weight_dtype, problem.factor_dtype):
        reasons.append("Triton's interpreter computes bf16 wrongly")
    if vendor not in ("cpu", "nvidia"):
        reasons.append(f"is compiled for NVIDIA {', '.join(ARCHS)}; this is {vendor} {name}")
    if vendor == "nvidia" and name not in ARCHS:
        reasons.append(f"is compiled for {', '.join(ARCHS)}; this is {name}")
    if vendor == "nvidia" and triton.knobs.runtime.interpret:
        reasons.append("TRITON_INTERPRET=1 is set, and interprets kernels on CPU tensors alone")
    for what, dtype in (("x", problem.dtype), ("weight", problem.weight_dtype), ("a factor", problem.factor_dtype)):
        if dtype not in DTYPES:
            reasons.append(f"{what} is {dtype}; the kernels compute in {', '.join(map(str, DTYPES))}")
    if max(problem.R) > configs.MAX_RANK:
        reasons.append(f"R={max(problem.R)} exceeds {configs.MAX_RANK}, the largest rank a tile holds")
    return tuple(reasons)


def how(primitive: str, problem: Problem) -> str | None:
    """The route a product takes, if its tensors lie as they usually do: ours by form and tile, or torch's. None for the others."""
    rows, cols = {"linear": (problem.K, sum(problem.N)), "grad_input": (sum(problem.N), problem.K)}.get(primitive, (0, 0))
    if not rows:
        return None
    aligned = not (problem.K * problem.dtype.itemsize % 16 or any(N * problem.dtype.itemsize % 16 for N in problem.N))
    masked = primitive == "grad_input" and problem.dropout > 0
    ends = int(problem.gain == "out") + int(problem.keep == "inner") if primitive == "linear" else 0
    asked = routes.Asked(problem.M, cols, (rows,), sum(problem.R), problem.dtype, problem.arch.name, masked, ends, aligned)
    return str(routes.pick(asked))


def project(x: torch.Tensor, downs: list[Down]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """h = drop(x) Aᵀ rounded to x's dtype, and h' = core(h).  x [...,K] -> h, h' [M,R] for each way down."""
    return down.project(flat(x), downs)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    ups: list[Up],
    gain: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    keep_inner: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """z = x Wᵀ + Σ h' (s·out_scale⊙B)ᵀ and y = gain⊙z + bias.  x [...,K], weight [N,K] -> y [...,N], z [M,N] or None.

    keep_inner, which needs a gain, returns z beside y.
    """
    x2, (N, K) = flat(x), weight.shape
    base = _base(x2, weight)
    asked = _asked(x2, N, (base,), sum(up.B.shape[1] for up in ups), ends=int(gain is not None) + int(keep_inner))
    route = routes.pick(asked)
    if not route.fused or not x2.shape[0] * N * K:
        low_first = None if route.fused else route.form == "low first"
        return eager.linear(x, weight, ups, gain, bias, keep_inner, low_first)
    y = x.new_empty(*x.shape[:-1], N)
    z = x2.new_empty(x2.shape[0], N) if keep_inner else None
    by_row = launch.dense(base.b, 1)
    lows = [Summand(up.mixed, factor(up.B, x.dtype, up.scaling, up.out_scale, by_row)) for up in ups]
    gemm(y.view(x2.shape[0], N), [base, *_joined(lows, route, by_row)], None, route, gain, bias, z)
    return y, z


def grad_output(
    dy: torch.Tensor,
    returns: list[Return],
    gain: torch.Tensor | None = None,
    kept: torch.Tensor | None = None,
    want_bias: bool = False,
) -> OutputGrads:
    """u = s(gain⊙out_scale⊙dy)B, v = u·core, d_core = uᵀh, dB = out_scale⊙P with P = s(gain⊙dy)ᵀh', Σdy and Σdy⊙kept.

    dy [...,N], kept [...,N] or None. Columns of dB before frozen_columns are zero and cost nothing.
    """
    return on_output.grad_output(flat(dy), returns, gain, None if kept is None else flat(kept), want_bias)


def grad_input(segments: list[Segment], low_ranks: list[LowRank]) -> torch.Tensor:
    """dx = Σ (gain⊙dy) W + Σ mask⊙(v A).  dy [...,N] -> dx [...,K]."""
    dy, K = segments[0].dy, segments[0].weight.shape[1]
    M, dropped = tokens(dy), [low for low in low_ranks if low.p]
    dx = dy.new_empty(*dy.shape[:-1], K)
    dx2 = dx.view(M, K)
    bases = [_base(a, b.t()) for a, b in map(eager.with_gain, segments)]
    plain = [low for low in low_ranks if not low.p]
    by_row = launch.dense(bases[0].b, 1)
    alike = all(launch.dense(base.b, 1 if by_row else 0) for base in bases)
    asked = _asked(
        dx2, K, tuple(bases), sum(low.A.shape[0] for low in low_ranks), masked=bool(dropped),
        fusable=alike and len(dropped) <= 1 and len(bases) + bool(plain) + bool(dropped) <= 4,
    )  # fmt: skip
    route = routes.pick(asked)
    if route.fused and M * K * min(base.a.shape[1] for base in bases):
        lows = [Summand(v, factor(A.t(), dy.dtype, by_row=by_row), seed, p) for v, A, seed, p in low_ranks]
        masked = _joined([low for low in lows if low.p], route, by_row)
        gemm(dx2, [*bases, *_joined([low for low in lows if not low.p], route, by_row)], masked[0] if masked else None, route)
        return dx
    low_first = route.form == "low first"
    products = [(v, A.to(dy.dtype)) for v, A, _, _ in plain] + [(base.a, base.b.t()) for base in bases]
    if low_first:
        for i, low in enumerate(dropped):
            masked_add(dx2, low, started=i > 0)
    eager.add_products(dx2, products, low_first and bool(dropped), low_first)
    if not low_first:
        for low in dropped:
            masked_add(dx2, low, started=True)
    return dx


def grad_project(x: torch.Tensor, low_ranks: list[LowRank]) -> list[torch.Tensor]:
    """dA = vᵀ drop(x), in fp32.  x [...,K], v [M,R] -> [R,K] each."""
    x2 = flat(x)
    return [on_A.grad_project(x2, low) for low in low_ranks]


def row_norm(weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scaling: Scaling = 1.0, axis: str = "out") -> torch.Tensor:
    """‖W + sBA‖ per row (axis="out", [N]) or per column (axis="in", [K]), in fp32."""
    return norms(weight, A, B, scaling, axis)


def _base(a: torch.Tensor, b: torch.Tensor) -> Summand:
    """a bᵀ in a's dtype, both dense along an axis a GEMM of ours reads them by.  a [M,K], b [N,K]"""
    b = b.to(a.dtype)
    b = b if launch.dense(b, 1) or launch.dense(b, 0) else b.contiguous()
    return Summand(a if launch.dense(a, 1) else a.contiguous(), b)


def _joined(lows: list[Summand], route: routes.Route, by_row: bool) -> list[Summand]:
    """Low-rank summands side by side as one, padded until its rows are as far apart as its form of reading wants them."""
    if not lows:
        return []
    a = lows[0].a if len(lows) == 1 else torch.cat([low.a for low in lows], dim=1)
    b = lows[0].b if len(lows) == 1 else torch.cat([low.b for low in lows], dim=1)
    apart = 1 if a.dtype == torch.float32 else 8 if route.form == "tma" else 16
    missing = -a.shape[1] % apart
    if missing or not launch.dense(a, 1):
        a = torch.nn.functional.pad(a, (0, missing)).contiguous()
    if missing:
        b = torch.nn.functional.pad(b, (0, missing))
    # A parameter may lie anywhere in a storage it shares.
    by_tma = route.form == "tma"
    if by_tma and not launch.aligned(a):
        a = a.clone(memory_format=torch.contiguous_format)
    if not launch.dense(b, 1 if by_row else 0) or (by_tma and not launch.aligned(b)):
        b = b.clone(memory_format=torch.contiguous_format) if by_row else b.t().clone(memory_format=torch.contiguous_format).t()
    return [Summand(a, b, lows[0].seed, lows[0].p)]


def _asked(
    like: torch.Tensor, N: int, bases: tuple[Summand, ...], R: int, masked: bool = False, ends: int = 0, fusable: bool = True
) -> routes.Asked:
    # Rows of y and z are as long as N; the low-rank operands are made to fit.
    aligned = N * like.itemsize % 16 == 0 and all(launch.aligned(base.a) and launch.aligned(base.b) for base in bases)
    lengths = tuple(base.a.shape[1] for base in bases)
    return routes.Asked(like.shape[0], N, lengths, R, like.dtype, launch.arch_of(like), masked, ends, aligned, fusable)
