"""The C++ backend for CPU tensors: torch's GEMM for the base, csrc/cpu for what is added to it.

Where torch has no quick GEMM in half precision, the base goes by panels in fp32 (half_products).
Each addition is one pass over its large operand. Results do not depend on the number of threads,
which is torch's. Python is slow right after a GEMM that has emptied the caches, so the arguments of
what follows one are made before it. lorafast.engine.backends.Backend describes the functions.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from lorafast.engine import half_products, philox
from lorafast.engine.backends import eager
from lorafast.engine.precision import apply_core, low_rank_grad_dtype
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
    as_one,
    tokens,
)
from lorafast.engine.row_blocks import flatten_tokens
from lorafast.runtime import extension, onednn

# As csrc/cpu/types.h numbers and bounds them.
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_MAX_RANK = 256
# Multiply-adds below which waking a second thread costs more than it saves.
_ONE_THREAD = 1 << 18
# Multiply-adds of a GEMM that leaves the caches filled; after a larger one every torch call is
# slow, so that one fewer is worth code of its own.
_SMALL = 1 << 22
# Elements of a row of an AMX tile in bf16. Where the rows of an operand are no multiple, torch 2.13
# multiplies what lies between strided rows by 0, and a NaN there stays one: they are made dense.
AMX_ROW = 32
# Tokens up to which one kernel computes y, which reads W as it lies in memory. Measured beside
# torch's product alone on two cores with AVX-512 and bf16, and with AVX2 alone, by one and two
# threads, 384x384 to 4096x4096: 0.2 to 0.98 of its time in all but one case (1.08).
_FEW_TOKENS = 16


@functools.cache
def library() -> Any:
    """The module of compiled kernels, or a str that says why there is none.

    The first call may compile them.
    """
    return extension.cpu()


def why_not(primitive: str, problem: Problem) -> tuple[str, ...]:
    if problem.arch.vendor != "cpu":
        return (f"runs on CPU tensors; this is {problem.arch.words}",)
    dtypes = problem.dtype, problem.weight_dtype, problem.factor_dtype
    reasons = [
        f"{name} is {dtype}; the kernels compute in {', '.join(map(str, TYPES))}"
        for name, dtype in zip(("x", "weight", "a factor"), dtypes, strict=True)
        if dtype not in TYPES
    ]
    if sum(problem.R) > _MAX_RANK:
        ranks = " + ".join(map(str, problem.R))
        reasons.append(f"R={ranks} exceeds {_MAX_RANK}, the largest rank of one call")
    if not reasons and isinstance(library(), str):
        reasons.append(library())
    return tuple(reasons)


def describe_route(primitive: str, problem: Problem) -> str | None:
    """The instruction set that the kernels were compiled for, and how the base is multiplied."""
    if isinstance(library(), str):
        return None
    few = primitive == "linear" and not problem.transposed
    if few and is_one_kernel(problem.M, problem.dtype):
        return f"{library().ISA}, y in one kernel"
    panels = half_products.describe_route(primitive, problem)
    return f"{library().ISA}, {panels}" if panels else library().ISA


def is_one_kernel(M: int, dtype: torch.dtype) -> bool:
    """True if one kernel computes y of M tokens where the rows of W are dense."""
    isa = library().ISA
    # Of one token in half precision AVX2 takes as long to widen W as torch takes in all.
    fewest = 2 if isa == "avx2" and dtype is not torch.float32 else 1
    return fewest <= M <= _FEW_TOKENS and isa != "scalar"


def workspace() -> int:
    """Bytes of the largest workspace of a kernel since the last call: torch sees none of them."""
    loaded = library.cache_info().currsize and not isinstance(library(), str)
    return library().largest_workspace() if loaded else 0


def project(x: torch.Tensor, downs: list[DownProj]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    x2, results = dense_rows(x), []
    # No comprehension, which before Python 3.12 is a call of its own.
    for A, core, seed, p in downs:
        results.append(_project(x2, A, seed, p, core))
    return results


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    ups: list[UpProj],
    gain: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    keep_inner: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    (N, K), M, dtype = weight.shape, x.shape[0] if x.dim() == 2 else tokens(x), x.dtype
    if weight.dtype != dtype:
        weight = weight.to(dtype)
    if K % AMX_ROW and dtype is torch.bfloat16:
        x = x.contiguous()
    # Without a gain the bias goes where the frozen layer adds it, so that an adapter at its start
    # changes no bit.
    gemm_bias, last_bias = (bias, None) if gain is None else (None, bias)
    if gemm_bias is not None and gemm_bias.dtype != dtype:
        gemm_bias = gemm_bias.to(dtype)
    z = torch.empty(M, N, dtype=dtype) if keep_inner else None
    up = ups[0] if len(ups) == 1 else as_one(ups, x, N) if ups or gain is not None else None
    if is_one_kernel(M, dtype) and weight.stride(1) == 1:
        y = _one_kernel(x, weight, up, gain, bias, z)
        if y is not None:
            return y, z
    addition = None
    if up is not None:
        h_core, B, scaling, scale = up
        addition = _low_rank_add(
            h_core, B, dtype, scaling, scale, gain=gain, bias=last_bias, inner=z
        )
    large = M * N * K >= _SMALL
    if dtype is not torch.float32 and half_products.serves(M, weight.t()):
        y = torch.empty(*x.shape[:-1], N, dtype=dtype)
        half_products.addmm(gemm_bias, flatten_tokens(x), weight.t(), y.view(M, N))
    elif large and gemm_bias is not None and onednn.is_available(x, weight):
        y = onednn.linear(x, weight, gemm_bias)
    elif large or x.dim() != 2:
        # With leading dims torch's own result would be a view.
        y = torch.empty(*x.shape[:-1], N, dtype=dtype)
        x2, y2 = x if x.dim() == 2 else flatten_tokens(x), y if x.dim() == 2 else y.view(M, N)
        if gemm_bias is None:
            torch.mm(x2, weight.t(), out=y2)
        else:
            torch.addmm(gemm_bias, x2, weight.t(), out=y2)
    else:
        y = F.linear(x, weight, gemm_bias)
    if addition is not None:
        library().low_rank_add(*addition.arguments, y.data_ptr())
    return y, z


def grad_output(
    dy: torch.Tensor,
    specs: list[UpProjGradSpec],
    gain: torch.Tensor | None = None,
    kept: torch.Tensor | None = None,
    want_bias: bool = False,
) -> OutputGrads:
    dy2, gain = dense_rows(dy), dense_fp32(gain)
    N = dy2.shape[1]
    d_bias = torch.empty(N, dtype=torch.float32) if want_bias else None
    dot = None if kept is None else torch.empty(N, dtype=torch.float32)
    # The sums that belong to no adapter are made with the first, or with one that needs nothing.
    first, *more = specs or [UpProjGradSpec(torch.empty(N, 1), want_v=False)]
    kept2 = None if kept is None else dense_rows(kept)
    adapters = [_up_proj_grads(dy2, first, gain, d_bias, kept2, dot)]
    adapters += [_up_proj_grads(dy2, spec, gain) for spec in more]
    return OutputGrads(adapters[: len(specs)], d_bias, dot)


def grad_input(bases: list[BaseTerm], low_ranks: list[LowRankTerm]) -> torch.Tensor:
    first = bases[0]
    dx = torch.empty(*first.dy.shape[:-1], first.weight.shape[1], dtype=first.dy.dtype)
    dx2 = dx if dx.dim() == 2 else flatten_tokens(dx)
    additions = [
        _low_rank_add(v, A.t(), dx.dtype, seed=seed, p=p) for v, A, seed, p, _ in low_ranks
    ]
    for base in bases:
        dy2, weight = gained_operands(base)
        start = None if base is first else dx2
        if dx.dtype is not torch.float32 and half_products.serves(dx2.shape[0], weight):
            half_products.addmm(start, dy2, weight, dx2)
        elif start is None:
            torch.mm(dy2, weight, out=dx2)
        else:
            dx2.addmm_(dy2, weight)
    for addition in additions:
        library().low_rank_add(*addition.arguments, dx.data_ptr())
    return dx


def grad_project(x: torch.Tensor, low_ranks: list[LowRankTerm]) -> list[torch.Tensor]:
    x2 = dense_rows(x)
    return [_grad_project(x2, v, seed, p) for v, _, seed, p, _ in low_ranks]


def row_norm(
    weight: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    scaling: Scaling = 1.0,
    axis: str = "out",
) -> torch.Tensor:
    by_row, given = axis == "out", weight
    if B.dtype not in TYPES:
        B = B.float()
    down, up = A, B.t()
    if weight.stride(1) != 1 and weight.stride(0) == 1:
        # ‖Wᵀ + sAᵀBᵀ‖ along the other axis: a transposed weight is read without a copy.
        weight, down, up, by_row = weight.t(), up, down, not by_row
    weight = dense_rows(weight)
    (N, K), R = weight.shape, A.shape[0]
    norm = torch.empty(N if by_row else K, dtype=torch.float32)
    adapted = library().row_norm(
        TYPES[weight.dtype], weight.data_ptr(), N, K, weight.stride(0), R,
        down.data_ptr(), TYPES[down.dtype], *down.stride(),
        up.data_ptr(), TYPES[up.dtype], *up.stride(),
        float(scaling), by_row, norm.data_ptr(), threads(N * K * R),
    )  # fmt: skip
    # BA is zero: torch's own norm.
    return norm if adapted else eager.row_norm(given, A, B, scaling, axis)


def drop(x: torch.Tensor, seed: torch.Tensor, p: float) -> torch.Tensor:
    out, x2 = torch.empty(x.shape, dtype=x.dtype), dense_rows(x)
    library().drop(
        TYPES[x.dtype], x2.data_ptr(), *x2.shape, x2.stride(0),
        seed.data_ptr(), philox.threshold(p), 0, out.data_ptr(), threads(16 * x.numel()),
    )  # fmt: skip
    return out


def dense_rows(x: torch.Tensor) -> torch.Tensor:
    """The activation as [M, width], dense along its rows: a view where possible, else a copy."""
    x2 = x if x.dim() == 2 else flatten_tokens(x)
    return x2 if x2.stride(1) == 1 or x2.shape[1] == 1 else x2.contiguous()


def dense_fp32(vector: torch.Tensor | None) -> torch.Tensor | None:
    """A gain or a bias as the kernels read it."""
    return None if vector is None else vector.to(torch.float32).contiguous()


def threads(work: int) -> int:
    """The threads for so many multiply-adds."""
    return 1 if work < _ONE_THREAD else torch.get_num_threads()


def _project(
    x2: torch.Tensor,
    factor: torch.Tensor,
    seed: torch.Tensor | None = None,
    p: float = 0.0,
    core: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """h = drop(x) factorᵀ, factor [R,K], and h' = core(h), both rounded once.  -> [M,R]"""
    # Here and in _low_rank_add small steps are written out: on a small layer a call costs more
    # than the kernel.
    (M, K), R, dtype = x2.shape, factor.shape[0], x2.dtype
    if factor.dtype not in TYPES:
        factor = factor.float()
    h = h_core = x2.new_empty(M, R)
    core_arguments: tuple[int, ...] = (0, 0, 0, 0, 0)
    if core is not None and core.dim() == 2:
        if core.dtype not in TYPES:
            core = core.float()
        h_core = x2.new_empty(M, R)
        core_arguments = (
            core.data_ptr(), TYPES[core.dtype], *core.stride(), h_core.data_ptr(),
        )  # fmt: skip
    work = M * K * R
    library().project(
        TYPES[dtype], x2.data_ptr(), M, K, x2.stride(0), R,
        factor.data_ptr(), TYPES[factor.dtype], *factor.stride(),
        seed.data_ptr() if p else 0, philox.threshold(p) if p else 0, h.data_ptr(),
        *core_arguments, 1 if work < _ONE_THREAD else torch.get_num_threads(),
    )  # fmt: skip
    if core is not None and core.dim() == 1:
        h_core = apply_core(h, core)
    return h, h_core


def _one_kernel(
    x: torch.Tensor,
    weight: torch.Tensor,
    up: UpProj | None,
    gain: torch.Tensor | None,
    bias: torch.Tensor | None,
    inner: torch.Tensor | None,
) -> torch.Tensor | None:
    """y = gain⊙(x Wᵀ + h' (s·scale⊙B)ᵀ) + bias; inner receives the sum before gain and bias.

    None if the adapter adds nothing: it then changes no bit of the frozen layer's y.
    """
    x2 = x if x.dim() == 2 and x.stride(1) == 1 else dense_rows(x)
    (N, K), dtype = weight.shape, x.dtype
    M, y = x2.shape[0], torch.empty(*x.shape[:-1], N, dtype=dtype)
    work = M * N * K
    if gain is not None:
        gain = gain.to(torch.float32).contiguous()
    if bias is not None:
        bias = bias.to(torch.float32).contiguous()
    low_rank, scale = (0, 0, 0, 0, 0, 0, 0, 1.0), None
    if up is not None:
        h, B, scaling, scale = up
        if h.stride(1) != 1:
            h = h.contiguous()
        if B.dtype not in TYPES:
            B = B.float()
        if scale is not None:
            scale = dense_fp32(scale)
        along_N, along_R = B.stride()
        low_rank = (
            h.data_ptr(), h.stride(0), B.shape[1], B.data_ptr(), TYPES[B.dtype], along_R, along_N,
            float(scaling),
        )  # fmt: skip
    written = library().linear(
        TYPES[dtype], x2.data_ptr(), M, K, x2.stride(0), weight.data_ptr(), N, weight.stride(0),
        *low_rank,
        0 if scale is None else scale.data_ptr(),
        0 if gain is None else gain.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if inner is None else inner.data_ptr(),
        1 if work < _ONE_THREAD else torch.get_num_threads(), y.data_ptr(),
    )  # fmt: skip
    return y if written else None


class _Addition(NamedTuple):
    """Arguments of low_rank_add but the last, and the tensors whose addresses are among them."""

    arguments: tuple
    operands: tuple


def _low_rank_add(
    h: torch.Tensor,
    factor: torch.Tensor,
    dtype: torch.dtype,
    scaling: Scaling = 1.0,
    scale: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
    p: float = 0.0,
    gain: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    inner: torch.Tensor | None = None,
) -> _Addition:
    """Prepare out = gain⊙(out + mask⊙(h (scaling·scale⊙factor)ᵀ)) + bias.

    The sum before gain and bias goes to inner, if there is one. h [M,R], fp32 or of out's dtype,
    factor [N,R]; inner [M,N] is dense, as out has to be, whose address is the last argument. All is
    prepared before the GEMM that fills out; the operands must live until the call.
    """
    (M, R), N = h.shape, factor.shape[0]
    if h.stride(1) != 1:
        h = h.contiguous()
    if factor.dtype not in TYPES:
        factor = factor.float()
    if scale is not None:
        scale = dense_fp32(scale)
    if gain is not None:
        gain = dense_fp32(gain)
    if bias is not None:
        bias = dense_fp32(bias)
    along_N, along_R = factor.stride()
    work = M * N * R
    arguments = (
        TYPES[dtype], TYPES[h.dtype], h.data_ptr(), M, h.stride(0), N, R,
        factor.data_ptr(), TYPES[factor.dtype], along_R, along_N, float(scaling),
        0 if scale is None else scale.data_ptr(),
        seed.data_ptr() if p else 0, philox.threshold(p) if p else 0,
        0 if gain is None else gain.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if inner is None else inner.data_ptr(),
        1 if work < _ONE_THREAD else torch.get_num_threads(),
    )  # fmt: skip
    return _Addition(arguments, (h, factor, scale, seed, gain, bias))


def _grad_project(
    x2: torch.Tensor, v: torch.Tensor, seed: torch.Tensor | None = None, p: float = 0.0
) -> torch.Tensor:
    """vᵀ drop(x) in fp32, v [M,R] -> [R,K]"""
    (M, K), R, v = x2.shape, v.shape[1], dense_rows(v.to(low_rank_grad_dtype(x2.dtype)))
    out = torch.empty(R, K, dtype=torch.float32)
    library().grad_project(
        TYPES[x2.dtype], x2.data_ptr(), M, K, x2.stride(0), v.data_ptr(), R, v.stride(0),
        seed.data_ptr() if p else 0, philox.threshold(p) if p else 0, out.data_ptr(),
        threads(M * K * R),
    )  # fmt: skip
    return out


def gained_operands(base: BaseTerm) -> tuple[torch.Tensor, torch.Tensor]:
    """The operands of (gain⊙dy) W, the gain in the smaller one."""
    dy, weight = base.dy, base.weight
    dy2 = dy if dy.dim() == 2 else flatten_tokens(dy)
    if dy2.shape[1] % AMX_ROW and dy2.dtype is torch.bfloat16:
        dy2 = dy2.contiguous()
    if weight.dtype != dy.dtype:
        weight = weight.to(dy.dtype)
    if base.gain is None:
        return dy2, weight
    gain = dense_fp32(base.gain)
    if dy2.shape[0] < weight.shape[1]:
        return _scale(dy2, gain, by_row=False), weight
    if weight.stride(1) != 1 and weight.stride(0) == 1:
        return dy2, _scale(weight.t(), gain, by_row=False).t()
    return dy2, _scale(weight, gain, by_row=True)


def _scale(x: torch.Tensor, gain: torch.Tensor, by_row: bool) -> torch.Tensor:
    """gain⊙x, with one gain for each row or for each column."""
    x = dense_rows(x)
    out = torch.empty(x.shape, dtype=x.dtype)
    library().scale(
        TYPES[x.dtype], x.data_ptr(), *x.shape, x.stride(0), gain.data_ptr(), by_row,
        out.data_ptr(), threads(16 * x.numel()),
    )  # fmt: skip
    return out


def _up_proj_grads(
    dy2: torch.Tensor,
    spec: UpProjGradSpec,
    gain: torch.Tensor | None,
    d_bias: torch.Tensor | None = None,
    kept: torch.Tensor | None = None,
    dot: torch.Tensor | None = None,
) -> UpProjGrads:
    """What one adapter needs of dy; d_bias and dot are filled where they are given."""
    (M, N), R = dy2.shape, spec.B.shape[1]
    u_dtype = low_rank_grad_dtype(dy2.dtype)
    u = torch.empty(M, R, dtype=u_dtype) if spec.want_v or spec.want_core else None
    P, h_core, columns = None, None, 0
    if spec.want_B or spec.want_out_scale:
        skipped = 0 if spec.want_out_scale else spec.frozen_columns
        columns = R - skipped
        P = (torch.zeros if skipped else torch.empty)(N, R, dtype=torch.float32)
        h_core = spec.h
        if spec.core is not None:
            diagonal, h = spec.core.dim() == 1, dense_rows(spec.h)
            h_core = apply_core(h, spec.core) if diagonal else _project(h, spec.core)[0]
        h_core = dense_rows(h_core)
    B, scale = spec.B, dense_fp32(spec.out_scale)
    if B.dtype not in TYPES:
        B = B.float()
    along_N, along_R = B.stride()
    library().grad_output(
        TYPES[dy2.dtype], dy2.data_ptr(), M, N, dy2.stride(0), R,
        B.data_ptr(), TYPES[B.dtype], along_R, along_N, float(spec.scaling),
        0 if gain is None else gain.data_ptr(),
        0 if scale is None else scale.data_ptr(),
        0 if u is None else u.data_ptr(),
        0 if h_core is None else h_core.data_ptr(), h_core.stride(0) if columns else 0, columns,
        0 if P is None else P.data_ptr(),
        0 if d_bias is None else d_bias.data_ptr(),
        0 if kept is None else kept.data_ptr(), 0 if kept is None else kept.stride(0),
        0 if dot is None else dot.data_ptr(), threads(M * N * R),
    )  # fmt: skip
    v = u if spec.want_v else None
    if v is not None and spec.core is not None:
        v = _apply_core_transposed(u, spec.core)
    return UpProjGrads(
        v,
        _B_grad(P, spec) if spec.want_B else None,
        _core_grad(u, spec) if spec.want_core else None,
        (P * spec.B).sum(1) if spec.want_out_scale else None,
    )


def _apply_core_transposed(u: torch.Tensor, core: torch.Tensor) -> torch.Tensor:
    """v = u·core"""
    return u * core.to(u.dtype) if core.dim() == 1 else _project(u, core.t())[0]


def _core_grad(u: torch.Tensor, spec: UpProjGradSpec) -> torch.Tensor:
    """uᵀh, or its diagonal; u contains s."""
    if spec.core.dim() == 1:
        return (u.float() * spec.h).sum(0)
    return _grad_project(dense_rows(spec.h), u)


def _B_grad(P: torch.Tensor, spec: UpProjGradSpec) -> torch.Tensor:
    """out_scale⊙P with its frozen columns zero."""
    dB = P if spec.out_scale is None else P * spec.out_scale[:, None]
    if spec.want_out_scale and spec.frozen_columns:
        dB[:, : spec.frozen_columns] = 0
    return dB
