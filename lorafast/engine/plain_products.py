"""A LoRA call of few tokens as plain torch products, on plain autograd.

The time of such a call is the host's, and the host path of an op is longer than that of three
products and a sum.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from lorafast.engine import dispatch, philox
from lorafast.engine.problem import CallOptions, DownProj, LayerTensors, LowRankTerm, tokens
from lorafast.engine.row_blocks import flatten_tokens
from lorafast.runtime import env, torch_internals

# Elements of x and y together, M·(K + N), up to which products are quicker than the op. Measured on
# two cores with AVX-512, shapes 384x384 to 1024x4096, one and two threads: the two cross between
# 200,000 and 400,000 elements, and between 50,000 and 100,000 where a product needs a copy of x,
# which is so for dropout and for factors wider than x.
MOST_ELEMENTS = 1 << 18
MOST_ELEMENTS_COPIED = 1 << 16


@functools.cache
def is_auto(raw: str | bytes | None) -> bool:
    """True if a value of LORAFAST_BACKEND, as env.raw_get gives it, forces no backend."""
    return env.parse_backend(raw) == "auto"


def few_tokens(M: int, N: int, K: int, copies_x: bool) -> bool:
    """True if a call on M tokens is expected to be quicker as plain products.

    copies_x: the products read x dropped or in a wider dtype.
    """
    most = MOST_ELEMENTS_COPIED if copies_x else MOST_ELEMENTS
    elements = M * (N + K)
    return elements <= most


def why_not(M: int, tensors: LayerTensors, options: CallOptions, dtype: torch.dtype) -> str | None:
    """Return why a call of M tokens in the dtype is left to the op, or None.

    With and without gradients the answer is the same: a recomputed forward gives the same bits.
    """
    weight, A = tensors.weight, tensors.lora_A
    if not weight.is_cpu:
        return "measured on CPUs only"
    if not is_auto(env.raw_get(env.BACKEND_KEY)):
        return f"{env.BACKEND.name} forces a backend"
    # For all of these but the scaling autograd would keep more than the op does.
    if (
        tensors.magnitude is not None
        or tensors.core is not None
        or tensors.out_scale is not None
        or tensors.scale is not None
        or options.frozen_columns
    ):
        return "no LoRA with a number as its scaling"
    if weight.dtype != dtype:
        return "a weight of another dtype"
    if dtype == A.dtype == torch.float16:
        return "fp16 throughout, in which plain autograd loses small gradients"
    N, K = weight.shape
    wider = A.dtype.itemsize > dtype.itemsize
    if wider and options.dropout > 0:
        return "dropout with factors wider than x, for which the op is quicker"
    copies_x = wider or options.dropout > 0
    return None if few_tokens(M, N, K, copies_x) else f"{M} tokens are not few"


def serves(x: torch.Tensor, tensors: LayerTensors, options: CallOptions) -> bool:
    """True if linear is the cheaper way for this call. Under autocast it is left to the op."""
    M = x.shape[0] if x.dim() == 2 else tokens(x)
    if torch_internals.any_autocast() or why_not(M, tensors, options, x.dtype):
        return False
    if env.parse_log(env.raw_get(env.LOG_KEY)):
        _announce(M, tuple(tensors.weight.shape), x.dtype)
    return True


@functools.cache
def _announce(M: int, weight: tuple[int, int], dtype: torch.dtype) -> None:
    """Print the choice once for each problem."""
    dispatch.announce(f"linear -> plain products; M={M}, weight {weight}, {dtype}")


def linear(x: torch.Tensor, tensors: LayerTensors, options: CallOptions) -> torch.Tensor:
    """Return y = x Wᵀ + bias + s·(drop(x) Aᵀ Bᵀ + lora_bias).  [...,N]

    The low-rank part is computed in the wider of x's and the factors' dtypes, as PEFT does. For
    backward it keeps x, or its copy in that dtype, and h [M,R].
    """
    weight, bias, A, B, lora_bias, seed = *tensors[:4], tensors.lora_bias, tensors.seed
    dtype, routes = x.dtype, None if seed is None else dispatch.routes(x, tensors, options)
    if bias is not None and bias.dtype is not dtype:
        bias = bias.to(dtype)
    y = F.linear(x, weight, bias)
    if A.dtype is not dtype or B.dtype is not dtype:
        wide = torch.promote_types(torch.promote_types(A.dtype, B.dtype), dtype)
        x, A, B = x.to(wide), A.to(wide), B.to(wide)
    h = F.linear(x, A) if seed is None else _drop_project(x, A, seed, options.dropout, routes)
    if lora_bias is not None and lora_bias.dtype is not B.dtype:
        lora_bias = lora_bias.to(B.dtype)
    low_rank = F.linear(h, B, lora_bias)
    # Beside fp16 the sum is wider too, or a gradient times the scaling would leave fp16's range.
    if low_rank.dtype is not dtype and dtype is not torch.float16:
        low_rank = low_rank.to(dtype)
    # Out of place, because the product of an x of more than two dimensions may be a view.
    y = torch.add(y, low_rank, alpha=options.scaling)  # type: ignore[arg-type]  # a number
    return y if y.dtype is dtype else y.to(dtype)


class _DropProject(torch.autograd.Function):
    """h = drop(x) Aᵀ with the op's dropout bits.

    Saves A and the seed by reference, and x if A trains.
    """

    @staticmethod
    def forward(ctx, x, A, seed, p, routes):
        ctx.p, ctx.routes = p, routes
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, A, seed)
        ((h, _),) = routes["project"].project(x, [DownProj(A, None, seed, p)])
        return h.view(*x.shape[:-1], A.shape[0])

    @staticmethod
    def backward(ctx, dh):
        (x, A, seed), p, routes = ctx.saved_tensors, ctx.p, ctx.routes
        needs_x, needs_A, *_ = ctx.needs_input_grad
        dx = dA = None
        if torch.is_grad_enabled() or not torch_internals.bypasses_dispatcher(dh, (x, A, seed)):
            # A backward that is differentiated again, batched or traced: torch's operations alone.
            if needs_x:
                dx = philox.differentiable_drop(torch.matmul(dh, A), seed, p)
            if needs_A:
                dropped = philox.differentiable_drop(x, seed, p)
                dA = torch.matmul(flatten_tokens(dh).t(), flatten_tokens(dropped))
            return dx, dA, None, None, None
        with torch_internals.below_autocast():
            if needs_x:
                dx = routes["grad_input"].drop(torch.matmul(dh, A), seed, p)
            if needs_A:
                low_rank = LowRankTerm(flatten_tokens(dh), A, seed, p)
                (dA,) = routes["grad_project"].grad_project(x, [low_rank])
                dA = dA.to(A.dtype)
        return dx, dA, None, None, None


# No call comes here from inside a functorch transform, which Function.apply looks for first.
_drop_project = torch_internals.function_apply(_DropProject)
