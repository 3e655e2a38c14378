"""Problems for the kernels of a GPU, one primitive per case, next to the same by stock torch.

lorafast-bench tune times Triton's on them, and the child of a trial checks its kernels and those of
the `cuda` backend.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F

from lorafast.engine import kernel_variants
from lorafast.engine.backends import Backend, eager
from lorafast.engine.kernels import cost, gemm_routing
from lorafast.engine.problem import Problem
from lorafast.engine.trial_forms import CUDA, TRITON
from lorafast.runtime import devices

PRODUCTS = ("linear", "grad_input")
STREAMS = ("project", "grad_output", "grad_project", "row_norm")
# The number of cases of one layer for Triton's kernels.
CASES_PER_LAYER = 11


class Sizes(NamedTuple):
    """One layer: M tokens, K in, N out, R rank, and the adapter's dropout p."""

    M: int
    K: int
    N: int
    R: int
    p: float


class KernelCase(NamedTuple):
    """One variant of one primitive on one layer.

    run: computes it by our kernels.
    eager: computes it by the eager backend.
    chain: computes it by stock torch in the given dtype, from the same tensors.
    frozen: the base product alone; None for a primitive without one.
    query: what the route of a product is chosen by; None for a primitive without routes.
    problem: the key that the backend of such a call is chosen by.
    """

    primitive: str
    variant: str
    sizes: Sizes
    run: Callable[[], list[torch.Tensor]]
    eager: Callable[[], list[torch.Tensor]]
    chain: Callable[[torch.dtype], list[torch.Tensor]]
    frozen: Callable[[], torch.Tensor] | None
    query: gemm_routing.RouteQuery | None
    problem: Problem

    @property
    def cost(self) -> cost.Cost:
        """Flops and bytes of one run."""
        return getattr(cost, self.primitive)(self.problem)


def backend_named(name: str) -> Backend:
    """Return a backend, which is imported when it is needed: Triton may not be there."""
    return cast(Backend, importlib.import_module(f"lorafast.engine.backends.{name}"))


def kernel_cases(
    sizes: Sizes,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    by: str = TRITON,
    factors: torch.dtype = torch.float32,
) -> list[KernelCase]:
    """Return the cases of a LoRA layer, and the variants that DoRA, LaMDA and Conv1D need.

    by: the backend whose kernels run. For `cuda`, whose kernels have more forms, there are further
    variants. factors: the dtype of the adapter's parameters.
    """
    backend = backend_named(by)
    o, p, arch = _operands(sizes, dtype, device, seed, factors), sizes.p, devices.of(device)
    problem = Problem(
        arch,
        dtype,
        sizes.M,
        sizes.K,
        (sizes.N,),
        (sizes.R,),
        dtype,
        factors,
        dropout=p,
    )
    frozen = {"linear": lambda: F.linear(o.x, o.W), "grad_input": lambda: o.dy @ o.W}
    queries = _queries(sizes, dtype, arch)
    variants = kernel_variants.usual(o)
    if by == CUDA:
        variants += kernel_variants.further(o)
    return [
        KernelCase(
            one.primitive,
            one.variant,
            sizes,
            functools.partial(one.run, backend),
            functools.partial(one.run, eager),
            one.chain,
            frozen.get(one.primitive),
            queries.get((one.primitive, one.variant)),
            replace(problem, **kernel_variants.FLAGS.get(one.variant, {})),
        )
        for one in variants
    ]


def _operands(
    sizes: Sizes,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    factors: torch.dtype = torch.float32,
) -> kernel_variants.Operands:
    M, K, N, R, p = sizes
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator, device=device) * scale).to(dtype)

    return kernel_variants.Operands(
        x=normal(M, K),
        dy=normal(M, N),
        W=normal(N, K, scale=K**-0.5),
        transposed=normal(K, N, scale=K**-0.5).t(),
        A=normal(R, K, scale=K**-0.5, dtype=factors),
        B=normal(N, R, dtype=factors),
        core=normal(R, R, scale=R**-0.5, dtype=factors),
        h=normal(M, R),
        v=normal(M, R, scale=N**-0.5),
        y=normal(M, N),
        gain=normal(N, scale=0.1, dtype=factors) + 1,
        bias=normal(N, dtype=factors),
        seed=torch.tensor([seed + 1], device=device) if p else None,
        p=p,
    )


def _queries(
    sizes: Sizes, dtype: torch.dtype, arch: devices.Arch
) -> dict[tuple[str, str], gemm_routing.RouteQuery]:
    """Return what the route is chosen by, for every variant of a product."""
    M, K, N, R, p = sizes
    aligned = K * dtype.itemsize % 16 == N * dtype.itemsize % 16 == 0
    linear = gemm_routing.RouteQuery(M, N, (K,), R, dtype, arch, aligned=aligned)
    return {
        ("linear", ""): linear,
        ("linear", "transposed"): linear._replace(by_row=False),
        ("linear", kernel_variants.INNER): linear._replace(epilogue_passes=2),
        ("grad_input", ""): linear._replace(N=K, K=(N,), by_row=False, masked=p > 0),
    }
