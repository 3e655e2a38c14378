"""A LoRA call of few tokens as plain torch products, on plain autograd.

The time of such a call is the host's, and the host path of an op is longer than that of three
products and a sum.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F

from lorafast.engine import checks, dispatch, half_products, philox
from lorafast.engine.problem import CallOptions, LayerTensors, Scaling
from lorafast.runtime import env, torch_internals

# Elements of x and y together, M·(K + N), up to which products are quicker than the op. Measured on
# two cores with AVX-512, shapes 384x384 to 1024x4096, one and two threads: the two cross between
# 200,000 and 400,000 elements, and between 50,000 and 100,000 where a product needs a copy of x,
# which is so for dropout and for factors wider than x.
MOST_ELEMENTS = 1 << 18
MOST_ELEMENTS_COPIED = 1 << 16
# Multiply-adds M·N·K up to which it is so where torch's products in x's dtype are slow: dy W then
# takes longer than the host path of the op. Measured on two cores with AVX2, shapes 32x32 to
# 1024x4096, one thread: with a gradient of x the two cross between 2^17 and 2^18 multiply-adds,
# without one between 2^17 and 2^19.
MOST_WORK_SLOW = 1 << 17

_PLAIN = (torch.nn.Parameter, torch.Tensor)


@functools.cache
def is_auto(raw: str | bytes | None) -> bool:
    """True if a value of LORAFAST_BACKEND, as env.raw_get gives it, forces no backend."""
    return env.parse_backend(raw) == "auto"


def few_tokens(M: int, N: int, K: int, copies_x: bool, dtype: torch.dtype) -> bool:
    """True if a call on M tokens of the dtype is expected to be quicker as plain products.

    copies_x: the products read x dropped or in a wider dtype.
    """
    most = MOST_ELEMENTS_COPIED if copies_x else MOST_ELEMENTS
    elements, work = M * (N + K), M * N * K
    return elements <= most and not (work > MOST_WORK_SLOW and half_products.torch_is_slow(dtype))


def why_not(M: int, tensors: LayerTensors, options: CallOptions, dtype: torch.dtype) -> str | None:
    """Return why a call of M tokens in the dtype is left to the op, or None.

    The rule of linear in words. With and without gradients the answer is the same: a recomputed
    forward gives the same bits.
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
    if options.dropout > 0 and not makes_masks():
        return "dropout without the C++ kernels, which make its mask, or on an untested torch"
    N, K = weight.shape
    copies_x = A.dtype.itemsize > dtype.itemsize or options.dropout > 0
    if few_tokens(M, N, K, copies_x, dtype):
        return None
    if few_tokens(M, N, K, copies_x, torch.float32):
        return f"torch has no quick product in {dtype} here"
    return f"{M} tokens are not few"


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    A: torch.Tensor,
    B: torch.Tensor,
    lora_bias: torch.Tensor | None,
    scaling: Scaling,
    p: float = 0.0,
    seed: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Return y = x Wᵀ + bias + s·(drop(x) Aᵀ Bᵀ + lora_bias), or None where the op must serve.

    Nothing need be checked before: what is wrong or unusual, on another device, under autocast or
    compiled, is None. A seed is drawn if none is given, and only if the answer is not None.

    The low-rank part is computed in the wider of x's and the factors' dtypes, as PEFT does. For
    backward it keeps x, its copy in that dtype or its dropped copy and a mask, and h [M,R].
    """
    # Written out, because for few tokens every function called is a part of the time.
    if torch.compiler.is_compiling() or type(x) is not torch.Tensor or type(scaling) is not float:
        return None
    if (elements := x.numel()) > MOST_ELEMENTS:
        return None
    try:
        (N, K), R, dtype, factor_dtype = weight.shape, A.shape[0], x.dtype, A.dtype
        served = (
            type(weight) in _PLAIN
            and type(A) in _PLAIN
            and type(B) in _PLAIN
            and weight.dtype is dtype
            and dtype in checks.DTYPES
            and x.is_cpu
            and weight.is_cpu
            and A.is_cpu
            and B.is_cpu
            and x.layout is weight.layout is torch.strided
            and x.shape[-1] == K > 0
            and A.shape == (R, K)
            and B.shape == (N, R)
            and R > 0
            and scaling - scaling == 0  # neither inf nor nan
            and is_auto(env.raw_get(env.BACKEND_KEY))
            and torch_internals.nothing_casts_or_traces()
            and (bias is None or _is_vector(bias, N))
            and (lora_bias is None or _is_vector(lora_bias, N))
        )
    except (AttributeError, TypeError, ValueError, IndexError, RuntimeError):
        return None
    if not served:
        return None
    wide = dtype
    if factor_dtype is not dtype or B.dtype is not dtype:
        if factor_dtype not in checks.DTYPES or B.dtype not in checks.DTYPES:
            return None
        wide = torch.promote_types(torch.promote_types(factor_dtype, B.dtype), dtype)
    elif dtype is torch.float16:
        return None
    copies_x = wide is not dtype or p > 0
    slow = elements * N > MOST_WORK_SLOW and half_products.torch_is_slow(dtype)
    if slow or elements * (N + K) > (MOST_ELEMENTS_COPIED if copies_x else MOST_ELEMENTS) * K:
        return None
    mask = _drop_mask(x, p, seed) if p > 0 else None
    if p > 0 and mask is None:
        return None
    if env.parse_log(env.raw_get(env.LOG_KEY)):
        _announce(elements // K, (N, K), dtype)
    return products(x, weight, bias, A, B, lora_bias, scaling, p, mask, wide)


def products(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    A: torch.Tensor,
    B: torch.Tensor,
    lora_bias: torch.Tensor | None,
    scaling: float,
    p: float,
    mask: torch.Tensor | None,
    wide: torch.dtype,
) -> torch.Tensor:
    """Return linear's y. mask: the dropped elements of x, or None; wide: of x and the factors."""
    dtype = x.dtype
    if bias is not None and bias.dtype is not dtype:
        bias = bias.to(dtype)
    y = F.linear(x, weight, bias)
    if mask is not None:
        x = x.masked_fill(mask, 0.0)
        # The factor on what is kept is multiplied with the scaling, and taken out of the bias.
        kept_scale = philox.scale(p)
        scaling *= kept_scale
        lora_bias = None if lora_bias is None else lora_bias / kept_scale
    if wide is not dtype or B.dtype is not wide or A.dtype is not wide:
        x, A, B = x.to(wide), A.to(wide), B.to(wide)
    if lora_bias is not None and lora_bias.dtype is not wide:
        lora_bias = lora_bias.to(wide)
    low_rank = F.linear(F.linear(x, A), B, lora_bias)
    # Beside fp16 the sum is wider too, or a gradient times the scaling would leave fp16's range.
    if wide is not dtype and dtype is not torch.float16:
        low_rank = low_rank.to(dtype)
    # Out of place, because the product of an x of more than two dimensions may be a view.
    y = torch.add(y, low_rank, alpha=scaling)
    return y if y.dtype is dtype else y.to(dtype)


def _is_vector(vector: torch.Tensor, length: int) -> bool:
    return (
        type(vector) in _PLAIN
        and vector.is_cpu
        and vector.shape == (length,)
        and vector.dtype in checks.DTYPES
    )


def makes_masks() -> bool:
    """True if products can drop in this process, as long as nobody looks on."""
    return torch_internals.enabled and _cpu_kernels() is not None


def _cpu_kernels() -> Any:
    """The module of C++ kernels, or None."""
    backend: Any = dispatch.load("cpu")
    library = backend if isinstance(backend, str) else backend.library()
    return None if isinstance(library, str) else library


def _drop_mask(x: torch.Tensor, p: float, seed: torch.Tensor | None) -> torch.Tensor | None:
    """Which elements of x a seed drops, or None without the C++ kernels or where somebody looks on.

    The kernel reads and writes memory, which a tensor under a mode or a transform may not have.
    """
    if not torch_internals.bypasses_dispatcher(x, (seed,)):
        return None
    kernels = _cpu_kernels()
    if kernels is None or not 0 < round(p * philox.STEPS) < philox.STEPS:
        return None
    if seed is None:
        seed = philox.draw_seed(x.device)
    out, columns, threshold = (
        torch.empty(x.shape, dtype=torch.bool),
        x.shape[-1],
        philox.threshold(p),
    )
    # On one thread: tokens are few.
    if elements := x.numel():
        rows = elements // columns
        kernels.drop_mask(rows, columns, seed.data_ptr(), threshold, out.data_ptr())
    return out


@functools.cache
def _announce(M: int, weight: tuple[int, int], dtype: torch.dtype) -> None:
    """Print the choice once for each problem."""
    dispatch.announce(f"linear -> plain products; M={M}, weight {weight}, {dtype}")
