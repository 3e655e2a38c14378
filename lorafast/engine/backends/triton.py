"""The Triton backend: the kernels in kernels/, and torch's matrix products where the model of
gemm_routing says that they are faster.

On a GPU through a driver, on CPU tensors through Triton's interpreter. `auto` picks it on a GPU
where a trial found the kernels right and faster (kernel_choice); LORAFAST_BACKEND=triton asks for
it anywhere. lorafast.engine.backends.Backend describes the functions.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton

from lorafast.engine import kernel_choice, trial
from lorafast.engine.backends import eager
from lorafast.engine.kernels import configs, gemm_routing, launch
from lorafast.engine.kernels import grad_output as grad_output_kernels
from lorafast.engine.kernels import grad_project as grad_project_kernels
from lorafast.engine.kernels import project as project_kernels
from lorafast.engine.kernels.drop import drop as drop_into
from lorafast.engine.kernels.gemm import Summand, gemm, is_many
from lorafast.engine.kernels.gpu_specs import Device
from lorafast.engine.kernels.low_rank_add import low_rank_add
from lorafast.engine.kernels.row_norm import row_norm as row_norm_kernel
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
from lorafast.runtime import devices, env

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def why_not(primitive: str, problem: Problem) -> tuple[str, ...]:
    dtypes = {
        "x": problem.dtype,
        "weight": problem.weight_dtype,
        "a factor": problem.factor_dtype,
    }
    reasons = _why_not_device(*problem.arch[:2], torch.bfloat16 in dtypes.values())
    reasons += [
        f"{name} is {dtype}; the kernels compute in {', '.join(map(str, DTYPES))}"
        for name, dtype in dtypes.items()
        if dtype not in DTYPES
    ]
    if max(problem.R) > configs.MAX_RANK:
        reasons.append(
            f"R={max(problem.R)} exceeds {configs.MAX_RANK}, the largest rank a tile holds"
        )
    if reasons or problem.arch.vendor == "cpu" or env.is_forced("triton"):
        return tuple(reasons)
    return kernel_choice.why_not(primitive, problem)


def _why_not_device(vendor: str, name: str, any_bf16: bool) -> list[str]:
    reasons = []
    if vendor == "cpu" and not env.interprets():
        reasons.append("runs on CPU tensors only in Triton's interpreter (TRITON_INTERPRET=1)")
    if vendor == "cpu" and any_bf16:
        reasons.append("Triton's interpreter computes bf16 wrongly")
    if vendor != "cpu":
        if why := trial.why_not_architecture(name):
            reasons.append(why)
        if triton.knobs.runtime.interpret:
            reasons.append("TRITON_INTERPRET=1 is set, and interprets kernels on CPU tensors alone")
    return reasons


def describe_route(primitive: str, problem: Problem) -> str | None:
    """The route of a product whose tensors have the usual strides: a kernel's form and tile, or
    torch's. None for the primitives that have one route.
    """
    if primitive not in kernel_choice.PRODUCTS:
        return None
    device = devices.seen(problem.arch)
    query = kernel_choice.query_of(
        primitive, problem, kernel_choice.measured_specs(device, problem.arch, problem.dtype)
    )
    return str(gemm_routing.pick(query))


def drop(x: torch.Tensor, seed: torch.Tensor, p: float) -> torch.Tensor:
    out, x2 = x.new_empty(x.shape), flatten_tokens(x)
    drop_into(out.view(x2.shape), x2, seed, p)
    return out


def project(x: torch.Tensor, downs: list[DownProj]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return project_kernels.project(flatten_tokens(x), downs)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    ups: list[UpProj],
    gain: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    keep_inner: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    x2, (N, K) = flatten_tokens(x), weight.shape
    M, base = x2.shape[0], Summand(x2, _cast(weight, x.dtype))
    R, passes = sum(up.B.shape[1] for up in ups), _epilogue_passes(gain is not None, keep_inner)
    query = _route_query(M, N, [base], R, epilogue_passes=passes)
    route = gemm_routing.pick(query)
    if not route.fused or not M * N * K:
        low_rank_first = None if route.fused else route.form == "low first"
        return eager.linear(x, base.b, ups, gain, bias, keep_inner, low_rank_first)
    y = launch.empty(x, x.dtype, *x.shape[:-1], N)
    z = launch.empty(x, x.dtype, M, N) if keep_inner else None
    low_ranks = [_LowRank(up.h_core, up.B, up.scaling, up.out_scale) for up in ups]
    summands = [_dense(base), *_concatenated(low_ranks, route, query.by_row)]
    gemm(flatten_tokens(y), summands, None, route, gain, bias, z)
    return y, z


def grad_output(
    dy: torch.Tensor,
    specs: list[UpProjGradSpec],
    gain: torch.Tensor | None = None,
    kept: torch.Tensor | None = None,
    want_bias: bool = False,
) -> OutputGrads:
    kept2 = None if kept is None else flatten_tokens(kept)
    return grad_output_kernels.grad_output(flatten_tokens(dy), specs, gain, kept2, want_bias)


def grad_input(bases: list[BaseTerm], low_ranks: list[LowRankTerm]) -> torch.Tensor:
    dy, K = bases[0].dy, bases[0].weight.shape[1]
    # v may be fp32 beside fp16: what is too small for fp16 does not count in dx, which is fp16.
    low_ranks = [
        term if term.v.dtype == dy.dtype else term._replace(v=term.v.to(dy.dtype))
        for term in low_ranks
    ]
    M, R = tokens(dy), sum(term.A.shape[0] for term in low_ranks)
    plain = [term for term in low_ranks if not term.p]
    dropped = [term for term in low_ranks if term.p]
    dx = launch.empty(dy, dy.dtype, *dy.shape[:-1], K)
    dx2 = flatten_tokens(dx)
    products = [Summand(a, b.t()) for a, b in map(eager.gained_operands, bases)]
    query = _route_query(M, K, products, R, len(dropped), bool(plain))
    route = gemm_routing.pick(query)
    if route.fused and M * K * min(product.a.shape[1] for product in products):
        own, masked = (
            _concatenated(
                [_LowRank(v, A.t(), seed=seed, p=p) for v, A, seed, p, _ in terms],
                route,
                query.by_row,
            )
            for terms in (plain, dropped)
        )
        summands = [*map(_dense, products), *own]
        gemm(dx2, summands, masked[0] if masked else None, route)
        return dx
    low_rank_first = route.form == "low first"
    factors = [(v, A.to(dy.dtype)) for v, A, *_ in plain]
    factors += [(product.a, product.b.t()) for product in products]
    if low_rank_first:
        for i, term in enumerate(dropped):
            low_rank_add(dx2, term, accumulate=i > 0)
    eager.add_products(dx2, factors, low_rank_first and bool(dropped), low_rank_first)
    if not low_rank_first:
        for term in dropped:
            low_rank_add(dx2, term, accumulate=True)
    return dx


def grad_project(x: torch.Tensor, low_ranks: list[LowRankTerm]) -> list[torch.Tensor]:
    x2 = flatten_tokens(x)
    return [grad_project_kernels.grad_project(x2, low) for low in low_ranks]


def row_norm(
    weight: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    scaling: Scaling = 1.0,
    axis: str = "out",
) -> torch.Tensor:
    return row_norm_kernel(weight, A, B, scaling, axis)


def _epilogue_passes(gains: bool, keeps_inner: bool) -> int:
    """Passes over the result that an epilogue saves."""
    return int(gains) + int(keeps_inner)


def _dense(base: Summand) -> Summand:
    """The summand with both operands dense along an axis by which a kernel reads them."""
    a, b = base.a, base.b
    dense_a, dense_b = launch.dense(a, 1), launch.dense(b, 1) or launch.dense(b, 0)
    if dense_a and dense_b:
        return base
    return base._replace(a=a if dense_a else a.contiguous(), b=b if dense_b else b.contiguous())


def _cast(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """t.to(dtype), which takes longer where there is nothing to cast."""
    return t if t.dtype == dtype else t.to(dtype)


class _LowRank(NamedTuple):
    """One low-rank summand a (s·row_scale⊙factor)ᵀ.  a [M,R], factor [N,R]"""

    a: torch.Tensor
    factor: torch.Tensor
    scaling: Scaling = 1.0
    row_scale: torch.Tensor | None = None
    seed: torch.Tensor | None = None
    p: float = 0.0


def _concatenated(
    low_ranks: list[_LowRank], route: gemm_routing.Route, by_row: bool
) -> list[Summand]:
    """The low-rank summands side by side as one; none if there are none.

    Padded until rows are as far apart as a descriptor needs, or as keeps loads by pointers wide
    and asynchronous.
    """
    if not low_ranks:
        return []
    by_tma = route.form == "tma"
    multiple, (first, *more) = 8 if by_tma else 16, low_ranks
    a, dtype = first.a, first.a.dtype
    padding = 1 if more else multiple
    b = scale_cast(first.factor, dtype, first.scaling, first.row_scale, by_row, padding)
    if more:
        a = torch.cat([term.a for term in low_ranks], dim=1)
        others = [scale_cast(t.factor, dtype, t.scaling, t.row_scale) for t in more]
        b = torch.nn.functional.pad(torch.cat([b, *others], dim=1), (0, -a.shape[1] % multiple))
    if a.shape[1] % multiple:
        a = torch.nn.functional.pad(a, (0, -a.shape[1] % multiple))
    # A parameter may lie anywhere in a storage that it shares.
    if not launch.dense(a, 1) or (by_tma and not launch.aligned(a)):
        a = _dense_copy(a)
    if not launch.dense(b, 1 if by_row else 0) or (by_tma and not launch.aligned(b)):
        b = _dense_copy(b, by_row)
    return [Summand(a, b, first.seed, first.p)]


def _dense_copy(t: torch.Tensor, by_row: bool = True) -> torch.Tensor:
    """A copy, dense along its rows or along its columns."""
    if by_row:
        return t.clone(memory_format=torch.contiguous_format)
    return t.t().clone(memory_format=torch.contiguous_format).t()


def _route_query(
    M: int,
    N: int,
    bases: list[Summand],
    R: int,
    dropped: int = 0,
    plain: bool = False,
    epilogue_passes: int = 0,
) -> gemm_routing.RouteQuery:
    """The key a route is chosen by.

    dropped: the number of low-rank summands with a mask. plain: True if one has none.
    """
    device, dtype = bases[0].a.device, bases[0].a.dtype
    arch = devices.of(device)
    specs = kernel_choice.measured_specs(device, arch, dtype)
    layouts = tuple([launch.layout(t) for base in bases for t in base[:2]])
    return _query_of(M, N, layouts, R, dropped, plain, epilogue_passes, dtype, arch, specs)


@functools.lru_cache(maxsize=4096)
def _query_of(
    M: int,
    N: int,
    layouts: tuple[tuple, ...],
    R: int,
    dropped: int,
    plain: bool,
    epilogue_passes: int,
    dtype: torch.dtype,
    arch: devices.Arch,
    specs: Device | None,
) -> gemm_routing.RouteQuery:
    operands = [launch.Layout(*one) for one in layouts]
    pairs = list(zip(operands[::2], operands[1::2], strict=True))
    first_b, e = operands[1], dtype.itemsize
    by_row = first_b.dense(1) or not first_b.dense(0)
    # An operand that is not dense is copied, and then aligned as its length allows. y and z have
    # rows of length N.
    aligned = [N * e % 16 == 0]
    for a, b in pairs:
        for operand, is_dense in ((a, a.dense(1)), (b, b.dense(1) or b.dense(0))):
            aligned.append(operand.describable if is_dense else operand.shape[1] * e % 16 == 0)
    same_order = all(b.dense(1 if by_row else 0) for _, b in pairs[1:])
    return gemm_routing.RouteQuery(
        M, N, tuple(a.shape[1] for a, _ in pairs), R, dtype, arch, by_row, dropped > 0,
        is_many(len(pairs) + plain, dropped > 0), epilogue_passes, all(aligned),
        same_order and dropped <= 1 and len(pairs) + plain + dropped <= 4, specs,
    )  # fmt: skip
