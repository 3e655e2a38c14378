"""The CUDA C++ backend: torch's GEMM for the base, csrc/cuda for what is added to it.

Each addition is one pass over its large operand; several adapters take one pass each. The output of
a few tokens is one launch, with the base product (cuda_decode). The kernels are compiled where they
run, each form when it is first needed. No GPU of this project has run them: `auto` picks the
backend where a trial found its kernels right and faster (cuda_choice), and LORAFAST_BACKEND=cuda
asks for it without one. lorafast.engine.backends.Backend describes the functions.
"""

from __future__ import annotations

import torch

from lorafast.engine import cuda_choice, cuda_decode, cuda_forms, cuda_grad_output, cuda_kernels
from lorafast.engine.backends import eager
from lorafast.engine.problem import (
    BaseTerm,
    DownProj,
    Gain,
    LowRankTerm,
    OutputGrads,
    Problem,
    Scaling,
    UpProj,
    UpProjGradSpec,
    as_one,
)
from lorafast.engine.row_blocks import flatten_tokens
from lorafast.runtime import env

_MAX_RANK = 256
# The kernels divide m by the norm.
LINEAR_DIVIDES = GRAD_OUTPUT_DIVIDES = True
# Whether `auto` may take it at all on a device, for the host path.
is_admitted = cuda_choice.is_admitted


def why_not(primitive: str, problem: Problem) -> tuple[str, ...]:
    reasons = [why] if (why := cuda_forms.why_not_architecture(problem.arch.name)) else []
    dtypes = {
        "x": problem.dtype,
        "weight": problem.weight_dtype,
        "a factor": problem.factor_dtype,
    }
    reasons += [
        f"{what} is {dtype}; the kernels compute in {', '.join(map(str, cuda_forms.DTYPES))}"
        for what, dtype in dtypes.items()
        if dtype not in cuda_forms.DTYPES
    ]
    if max(problem.R) > _MAX_RANK:
        reasons.append(f"R={max(problem.R)} exceeds {_MAX_RANK}, the largest rank of the kernels")
    if not reasons and not env.is_forced("cuda"):
        reasons += cuda_choice.why_not(primitive, problem)
    if not reasons and (why := cuda_forms.why_not()):
        reasons.append(why)
    return tuple(reasons)


def project(x: torch.Tensor, downs: list[DownProj]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    x2 = flatten_tokens(x)
    return [cuda_kernels.project(x2, down) for down in downs]


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    ups: list[UpProj],
    gain: torch.Tensor | Gain | None = None,
    bias: torch.Tensor | None = None,
    keep_inner: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    x2, N, weight = flatten_tokens(x), weight.shape[0], _cast(weight, x.dtype)
    up = ups[0] if len(ups) == 1 else as_one(ups, x2, N)
    y = x.new_empty(*x.shape[:-1], N)
    y2 = y.view(x2.shape[0], N)
    z = torch.empty_like(y2) if keep_inner and gain is not None else None
    if ups and cuda_decode.serves(x2, weight, up):
        cuda_decode.decode(y2, x2, weight, up, gain, bias, z)
        return y, z
    if gain is None:
        _start(y2, up if ups else None, bias)
        _add_product(y2, x2, weight.t(), bool(ups) or bias is not None)
        return y, None
    _add_product(y2, x2, weight.t(), False)
    cuda_kernels.low_rank_add(
        y2, up.h_core, up.B, scaling=up.scaling, row_scale=up.out_scale, gain=gain, bias=bias,
        inner=z,
    )  # fmt: skip
    return y, z


def grad_output(
    dy: torch.Tensor,
    specs: list[UpProjGradSpec],
    gain: torch.Tensor | Gain | None = None,
    kept: torch.Tensor | None = None,
    want_bias: bool = False,
) -> OutputGrads:
    dy2, kept2 = flatten_tokens(dy), None if kept is None else flatten_tokens(kept)
    requested = 2 if kept2 is not None else int(want_bias)
    gain = Gain(gain) if isinstance(gain, torch.Tensor) else gain
    # The sums that belong to no adapter are made with the first.
    made = [
        cuda_grad_output.grads_of(dy2, spec, gain, kept2, 0 if i else requested)
        for i, spec in enumerate(specs)
    ]
    sums = made[0].sums if made else None
    if requested and not made:
        sums = cuda_grad_output.sums_of(dy2, kept2, requested)
    return OutputGrads(
        [one.grads for one in made],
        sums[0] if want_bias else None,
        None if kept2 is None else sums[1],
        *(made[0][2:] if made else ()),
    )


def grad_input(bases: list[BaseTerm], low_ranks: list[LowRankTerm]) -> torch.Tensor:
    dy, K = bases[0].dy, bases[0].weight.shape[1]
    dx = dy.new_empty(*dy.shape[:-1], K)
    dx2 = flatten_tokens(dx)
    for i, (v, A, seed, p, _) in enumerate(low_ranks):
        cuda_kernels.low_rank_add(dx2, v, A.t(), seed, p, accumulate=i > 0)
    for i, base in enumerate(bases):
        _add_product(dx2, *eager.gained_operands(base), i > 0 or bool(low_ranks))
    return dx


def grad_project(x: torch.Tensor, low_ranks: list[LowRankTerm]) -> list[torch.Tensor]:
    x2 = flatten_tokens(x)
    return [cuda_kernels.grad_project(x2, v, seed, p) for v, _, seed, p, _ in low_ranks]


def row_norm(
    weight: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    scaling: Scaling = 1.0,
    axis: str = "out",
) -> torch.Tensor:
    return cuda_kernels.row_norm(weight, A, B, scaling, axis == "out")


def gain_of(magnitude: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """Return formula.gain_of, by one launch."""
    return cuda_kernels.quotient(magnitude, None, norm)[0]


def gain_grads(
    d_gain: torch.Tensor,
    gain: torch.Tensor,
    norm: torch.Tensor,
    by_gain: bool = False,
    want_norm: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return formula.gain_grads, by one launch."""
    return cuda_kernels.quotient(
        d_gain, gain if by_gain else None, norm, gain if want_norm else None
    )


def drop(x: torch.Tensor, seed: torch.Tensor, p: float) -> torch.Tensor:
    out, x2 = x.new_empty(x.shape), flatten_tokens(x)
    cuda_kernels.drop_into(out.view(x2.shape), x2, seed, p)
    return out


def _cast(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """t.to(dtype), which takes longer where there is nothing to cast."""
    return t if t.dtype == dtype else t.to(dtype)


def _start(y2: torch.Tensor, up: UpProj | None, bias: torch.Tensor | None) -> None:
    """Write what the base product is added to: bias + h' (s·out_scale⊙B)ᵀ, as far as it exists.

    The product comes last, so that the sum is rounded once; and the kernel reads no y.
    """
    if up is not None:
        cuda_kernels.low_rank_add(
            y2, up.h_core, up.B, accumulate=False, scaling=up.scaling, row_scale=up.out_scale,
            bias=bias,
        )  # fmt: skip
    elif bias is not None:
        y2.copy_(bias)


def _add_product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, started: bool) -> None:
    """Compute out = (out if started) + a b in place."""
    if started:
        out.addmm_(a, b)
    else:
        torch.mm(a, b, out=out)
