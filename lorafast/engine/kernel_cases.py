"""Problems for the kernels of a GPU, one primitive per case, next to the same by stock torch.

lorafast-bench tune times Triton's on them, and the child of a trial checks its kernels and those of
the `cuda` backend.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F

from lorafast.engine import philox
from lorafast.engine.backends import Backend, eager
from lorafast.engine.kernels import cost, gemm_routing
from lorafast.engine.problem import (
    BaseTerm,
    DownProj,
    LowRankTerm,
    Problem,
    UpProj,
    UpProjGradSpec,
)
from lorafast.engine.trial_forms import CUDA, TRITON
from lorafast.runtime import devices

PRODUCTS = ("linear", "grad_input")
STREAMS = ("project", "grad_output", "grad_project", "row_norm")
KEPT = "gain, core and dot"
GAINED, INNER = "gain and bias", "gain, bias and z"
# What the problem of a variant differs in.
_FLAGS: dict[str, dict[str, Any]] = {
    "core": {"core": "full"},
    INNER: {"gain": "out", "keep": "inner"},
    KEPT: {"gain": "out", "keep": "output", "core": "full"},
    "by column": {"gain": "in"},
    "transposed": {"transposed": True},
    GAINED: {"gain": "out"},
}
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


class _Variant(NamedTuple):
    """The part of a KernelCase that differs between the variants of a layer.

    run: computes it by a backend.
    """

    primitive: str
    variant: str
    run: Callable[[Backend], list[torch.Tensor]]
    chain: Callable[[torch.dtype], list[torch.Tensor]]


class _Operands(NamedTuple):
    """Random operands of one layer; adapter parameters are usually fp32, as in training."""

    x: torch.Tensor
    dy: torch.Tensor
    W: torch.Tensor
    transposed: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    core: torch.Tensor
    h: torch.Tensor
    v: torch.Tensor
    y: torch.Tensor
    gain: torch.Tensor
    bias: torch.Tensor
    seed: torch.Tensor | None
    p: float

    def drop(self, t: torch.Tensor) -> torch.Tensor:
        """Return drop(t) with the mask of these operands."""
        return philox.drop(t, self.seed, self.p) if self.p else t

    def h_of(self, dtype: torch.dtype) -> torch.Tensor:
        """Return drop(x) Aᵀ."""
        return F.linear(self.drop(self.x.to(dtype)), self.A.to(dtype))

    def inner(self, dtype: torch.dtype, weight: torch.Tensor) -> torch.Tensor:
        """Return x Wᵀ + h Bᵀ."""
        base = F.linear(self.x.to(dtype), weight.to(dtype))
        return base + F.linear(self.h.to(dtype), self.B.to(dtype))

    def merged(self, dtype: torch.dtype) -> torch.Tensor:
        """Return W + BA."""
        return self.W.to(dtype) + self.B.to(dtype) @ self.A.to(dtype)

    def grad_output_chain(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """Return v, dB, d_core and Σ dy⊙y of a layer with a gain and a core."""
        dy, core, h = self.dy.to(dtype), self.core.to(dtype), self.h.to(dtype)
        dz = self.gain.to(dtype) * dy
        u = dz @ self.B.to(dtype)
        dot = (dy * self.y.to(dtype)).sum(0)
        return [u @ core, dz.t() @ F.linear(h, core), u.t() @ h, dot]

    def grad_output(self, backend: Backend) -> list[torch.Tensor]:
        """Return the same by a backend."""
        spec = UpProjGradSpec(self.B, core=self.core, h=self.h, want_B=True, want_core=True)
        grads = backend.grad_output(self.dy, [spec], self.gain, self.y)
        return [*grads.adapters[0][:3], grads.dot]


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
    variants = [*_products(o), *_streams(o)]
    if by == CUDA:
        variants += [*_more_products(o), *_more_streams(o), *_gains(o)]
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
            replace(problem, **_FLAGS.get(one.variant, {})),
        )
        for one in variants
    ]


def _operands(
    sizes: Sizes,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    factors: torch.dtype = torch.float32,
) -> _Operands:
    M, K, N, R, p = sizes
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator, device=device) * scale).to(dtype)

    return _Operands(
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


def _products(o: _Operands) -> list[_Variant]:
    """Return the primitives that contain a base product."""
    up, low_rank = [UpProj(o.h, o.B)], [LowRankTerm(o.v, o.A, o.seed, o.p)]

    def with_gain(dtype: torch.dtype) -> list[torch.Tensor]:
        z = o.inner(dtype, o.W)
        return [o.gain.to(dtype) * z + o.bias.to(dtype), z]

    def grad_input(dtype: torch.dtype) -> list[torch.Tensor]:
        low = o.drop(o.v.to(dtype) @ o.A.to(dtype))
        return [o.dy.to(dtype) @ o.W.to(dtype) + low]

    return [
        _Variant(
            "linear",
            "",
            lambda backend: [backend.linear(o.x, o.W, up)[0]],
            lambda dtype: [o.inner(dtype, o.W)],
        ),
        _Variant(
            "linear",
            "transposed",
            lambda backend: [backend.linear(o.x, o.transposed, up)[0]],
            lambda dtype: [o.inner(dtype, o.transposed)],
        ),
        _Variant(
            "linear",
            INNER,
            lambda backend: list(backend.linear(o.x, o.W, up, o.gain, o.bias, keep_inner=True)),
            with_gain,
        ),
        _Variant(
            "grad_input",
            "",
            lambda backend: [backend.grad_input([BaseTerm(o.dy, o.W)], low_rank)],
            grad_input,
        ),
    ]


def _streams(o: _Operands) -> list[_Variant]:
    """Return the primitives whose time is that of reading their operands."""
    plain = UpProjGradSpec(o.B, h=o.h, want_B=True)
    down, low_rank = DownProj(o.A, None, o.seed, o.p), [LowRankTerm(o.v, o.A, o.seed, o.p)]

    def grad_output(dtype: torch.dtype) -> list[torch.Tensor]:
        dy = o.dy.to(dtype)
        return [dy @ o.B.to(dtype), dy.t() @ o.h.to(dtype)]

    return [
        _Variant(
            "project",
            "",
            lambda backend: [backend.project(o.x, [down])[0][0]],
            lambda dtype: [o.h_of(dtype)],
        ),
        _Variant(
            "project",
            "core",
            lambda backend: [backend.project(o.x, [down._replace(core=o.core)])[0][1]],
            lambda dtype: [F.linear(o.h_of(dtype), o.core.to(dtype))],
        ),
        _Variant(
            "grad_output",
            "",
            lambda backend: list(backend.grad_output(o.dy, [plain]).adapters[0][:2]),
            grad_output,
        ),
        _Variant("grad_output", KEPT, o.grad_output, o.grad_output_chain),
        _Variant(
            "grad_project",
            "",
            lambda backend: backend.grad_project(o.x, low_rank),
            lambda dtype: [o.v.to(dtype).t() @ o.drop(o.x.to(dtype))],
        ),
        _Variant(
            "row_norm",
            "",
            lambda backend: [backend.row_norm(o.W, o.A, o.B)],
            lambda dtype: [o.merged(dtype).norm(dim=1)],
        ),
        _Variant(
            "row_norm",
            "by column",
            lambda backend: [backend.row_norm(o.W, o.A, o.B, axis="in")],
            lambda dtype: [o.merged(dtype).norm(dim=0)],
        ),
    ]


def _more_products(o: _Operands) -> list[_Variant]:
    """Return further products, for which the cuda backend has forms of their own."""
    up, term = [UpProj(o.h, o.B)], LowRankTerm(o.v, o.A, o.seed, o.p)

    def gained(dtype: torch.dtype) -> list[torch.Tensor]:
        return [o.gain.to(dtype) * o.inner(dtype, o.W) + o.bias.to(dtype)]

    def twice_added(dtype: torch.dtype) -> list[torch.Tensor]:
        return [o.dy.to(dtype) @ o.W.to(dtype) + 2 * o.drop(o.v.to(dtype) @ o.A.to(dtype))]

    return [
        _Variant(
            "linear",
            "bias",
            lambda backend: [backend.linear(o.x, o.W, up, None, o.bias)[0]],
            lambda dtype: [o.inner(dtype, o.W) + o.bias.to(dtype)],
        ),
        _Variant(
            "linear",
            GAINED,
            lambda backend: [backend.linear(o.x, o.W, up, o.gain, o.bias)[0]],
            gained,
        ),
        _Variant(
            "grad_input",
            "two adapters",
            lambda backend: [backend.grad_input([BaseTerm(o.dy, o.W)], [term, term])],
            twice_added,
        ),
    ]


def _more_streams(o: _Operands) -> list[_Variant]:
    """Return further streams, for which the cuda backend has forms of their own."""
    P = UpProjGradSpec(o.B, h=o.h, want_v=False, want_B=True)
    both = P._replace(want_v=True)

    def grads(
        specs: list[UpProjGradSpec], kept: torch.Tensor | None = None, want_bias: bool = True
    ) -> Callable[[Backend], list[torch.Tensor]]:
        """Return the run that yields dB of each spec, Σ dy, and Σ dy⊙kept if something is kept."""

        def run(backend: Backend) -> list[torch.Tensor]:
            found = backend.grad_output(o.dy, specs, None, kept, want_bias)
            every = [*(one.dB for one in found.adapters), found.d_bias, found.dot]
            return [one for one in every if one is not None]

        return run

    def scaled(backend: Backend) -> list[torch.Tensor]:
        # A factor that lies across, as that of one rank does.
        across = o.B.t().contiguous().t()
        spec = UpProjGradSpec(across, 0.5, o.gain, h=o.h, want_B=True, want_out_scale=True)
        grads = backend.grad_output(o.dy, [spec]).adapters[0]
        return [grads[0], grads[1], grads[3]]

    def scaled_chain(dtype: torch.dtype) -> list[torch.Tensor]:
        dy, B, out_scale = o.dy.to(dtype), o.B.to(dtype), o.gain.to(dtype)[:, None]
        P = 0.5 * dy.t() @ o.h.to(dtype)
        return [0.5 * dy @ (out_scale * B), out_scale * P, (P * B).sum(1)]

    def chain(dtype: torch.dtype) -> list[torch.Tensor]:
        dy = o.dy.to(dtype)
        return [dy.t() @ o.h.to(dtype), dy.sum(0), (dy * o.y.to(dtype)).sum(0)]

    drop = _Variant(
        "drop",
        "",
        lambda backend: [backend.drop(o.x, o.seed, o.p)],
        lambda dtype: [o.drop(o.x.to(dtype))],
    )
    return [
        *([drop] if o.p else []),
        _Variant("grad_output", "out_scale", scaled, scaled_chain),
        _Variant("grad_output", "B", grads([P], want_bias=False), lambda d: chain(d)[:1]),
        _Variant("grad_output", "B and bias", grads([P]), lambda d: chain(d)[:2]),
        _Variant("grad_output", "B, bias and dot", grads([P], o.y), chain),
        _Variant("grad_output", "bias", grads([both]), lambda d: chain(d)[:2]),
        _Variant("grad_output", "bias alone", grads([]), lambda d: chain(d)[1:2]),
        _Variant("grad_output", "bias and dot", grads([], o.y), lambda d: chain(d)[1:]),
    ]


def _gains(o: _Operands) -> list[_Variant]:
    """Return what the cuda backend has beside primitives, with each that may ask for it."""

    def gains(backend: Any) -> list[torch.Tensor]:
        # Functions that this backend has beside the protocol's.
        gain, norm = backend.gain_of(o.bias, o.gain), o.gain.float()
        return [gain, *backend.gain_grads(o.bias.float(), gain, norm, True, True)]

    def gains_chain(dtype: torch.dtype) -> list[torch.Tensor]:
        # In fp32 where a dtype is smaller, as in a layer.
        wide = torch.promote_types(dtype, torch.float32)
        bias, norm = o.bias.to(wide), o.gain.to(wide)
        gain = bias / norm
        d_magnitude = bias / gain / norm
        return [gain, d_magnitude, -d_magnitude * gain]

    return [
        _Variant(name, "gain", gains, gains_chain) for name in ("project", "linear", "grad_output")
    ]


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
        ("linear", INNER): linear._replace(epilogue_passes=2),
        ("grad_input", ""): linear._replace(N=K, K=(N,), by_row=False, masked=p > 0),
    }
