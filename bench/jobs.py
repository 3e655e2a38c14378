"""The Triton kernels one primitive at a time: operands, the same by stock torch in any dtype, and what a route may change."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from lorafast.engine import philox
from lorafast.engine.backends import triton
from lorafast.engine.kernels import cost, gemm_routing
from lorafast.engine.problem import (
    BaseTerm,
    DownProj,
    LowRankTerm,
    Problem,
    UpProj,
    UpProjGradSpec,
)
from lorafast.runtime import devices

PRODUCTS = ("linear", "grad_input")
STREAMS = ("project", "grad_output", "grad_project", "row_norm")
# How many jobs a layer has.
JOBS = 11


class Sizes(NamedTuple):
    """One layer: M tokens, K in, N out, R rank, and the adapter's dropout."""

    M: int
    K: int
    N: int
    R: int
    p: float


class Job(NamedTuple):
    """One primitive on one layer, in one variant of it. run: by our kernels; chain: by stock torch in a dtype, the same tensors.

    frozen: the base product alone, for a primitive that has one; asked: what its routes are chosen by; cost: of one run.
    """

    primitive: str
    variant: str
    sizes: Sizes
    run: Callable[[], list[torch.Tensor]]
    chain: Callable[[torch.dtype], list[torch.Tensor]]
    frozen: Callable[[], torch.Tensor] | None
    asked: gemm_routing.Asked | None
    cost: cost.Cost


class _Operands(NamedTuple):
    """Random operands of one layer; factors fp32, as they are trained."""

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
        """drop(t), with these operands' mask."""
        return philox.dropped(t, self.seed, self.p) if self.p else t

    def inner(self, c: torch.dtype, weight: torch.Tensor) -> torch.Tensor:
        """x Wᵀ + h Bᵀ"""
        return F.linear(self.x.to(c), weight.to(c)) + F.linear(self.h.to(c), self.B.to(c))

    def folded(self, c: torch.dtype) -> torch.Tensor:
        """W + BA"""
        return self.W.to(c) + self.B.to(c) @ self.A.to(c)

    def returned(self, c: torch.dtype) -> list[torch.Tensor]:
        """v, dB, d_core and Σ dy⊙y of a layer with a gain and a core."""
        dz, core, h = self.gain.to(c) * self.dy.to(c), self.core.to(c), self.h.to(c)
        u = dz @ self.B.to(c)
        return [
            u @ core,
            dz.t() @ F.linear(h, core),
            u.t() @ h,
            (self.dy.to(c) * self.y.to(c)).sum(0),
        ]

    def summed(self) -> list[torch.Tensor]:
        """The same by our kernels."""
        back = UpProjGradSpec(self.B, core=self.core, h=self.h, want_B=True, want_core=True)
        sums = triton.grad_output(self.dy, [back], self.gain, self.y)
        return [*sums.adapters[0][:3], sums.dot]


def _operands(sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int) -> _Operands:
    M, K, N, R, p = sizes
    random = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, by: float = 1.0, of: torch.dtype = dtype) -> torch.Tensor:
        return (torch.randn(*shape, generator=random, device=device) * by).to(of)

    wide = torch.float32
    return _Operands(
        x=normal(M, K), dy=normal(M, N), W=normal(N, K, by=K**-0.5), transposed=normal(K, N, by=K**-0.5).t(),
        A=normal(R, K, by=K**-0.5, of=wide), B=normal(N, R, of=wide), core=normal(R, R, by=R**-0.5, of=wide),
        h=normal(M, R), v=normal(M, R, by=N**-0.5), y=normal(M, N), gain=normal(N, by=0.1, of=wide) + 1, bias=normal(N, of=wide),
        seed=torch.tensor([seed + 1], device=device) if p else None, p=p,
    )  # fmt: skip


def jobs(sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int) -> list[Job]:
    """Every primitive of a LoRA layer, and what DoRA, LaMDA and a transposed weight make of it."""
    M, K, N, R, p = sizes
    o = _operands(sizes, dtype, device, seed)
    low, plain, adapted = (
        LowRankTerm(o.v, o.A, o.seed, p),
        UpProjGradSpec(o.B, h=o.h, want_B=True),
        [UpProj(o.h, o.B)],
    )
    down = DownProj(o.A, None, o.seed, p)

    def h(c: torch.dtype) -> torch.Tensor:
        return F.linear(o.drop(o.x.to(c)), o.A.to(c))

    ways = [
        ("linear", "", lambda: [triton.linear(o.x, o.W, adapted)[0]], lambda c: [o.inner(c, o.W)]),
        ("linear", "transposed", lambda: [triton.linear(o.x, o.transposed, adapted)[0]], lambda c: [o.inner(c, o.transposed)]),
        (
            "linear", "gain, bias and z", lambda: list(triton.linear(o.x, o.W, adapted, o.gain, o.bias, keep_inner=True)),
            lambda c: [o.gain.to(c) * o.inner(c, o.W) + o.bias.to(c), o.inner(c, o.W)],
        ),
        (
            "grad_input", "", lambda: [triton.grad_input([BaseTerm(o.dy, o.W)], [low])],
            lambda c: [o.dy.to(c) @ o.W.to(c) + o.drop(o.v.to(c) @ o.A.to(c))],
        ),
        ("project", "", lambda: [triton.project(o.x, [down])[0][0]], lambda c: [h(c)]),
        (
            "project", "core", lambda: [triton.project(o.x, [down._replace(core=o.core)])[0][1]],
            lambda c: [F.linear(h(c), o.core.to(c))],
        ),
        (
            "grad_output", "", lambda: list(triton.grad_output(o.dy, [plain]).adapters[0][:2]),
            lambda c: [o.dy.to(c) @ o.B.to(c), o.dy.to(c).t() @ o.h.to(c)],
        ),
        ("grad_output", "gain, core and dot", o.summed, o.returned),
        ("grad_project", "", lambda: triton.grad_project(o.x, [low]), lambda c: [o.v.to(c).t() @ o.drop(o.x.to(c))]),
        ("row_norm", "", lambda: [triton.row_norm(o.W, o.A, o.B)], lambda c: [o.folded(c).norm(dim=1)]),
        ("row_norm", "by column", lambda: [triton.row_norm(o.W, o.A, o.B, axis="in")], lambda c: [o.folded(c).norm(dim=0)]),
    ]  # fmt: skip
    frozen = {"linear": lambda: F.linear(o.x, o.W), "grad_input": lambda: o.dy @ o.W}
    aligned = K * dtype.itemsize % 16 == N * dtype.itemsize % 16 == 0
    linear = gemm_routing.Asked(M, N, (K,), R, dtype, devices.of(device).name, aligned=aligned)
    asked = {
        ("linear", ""): linear,
        ("linear", "transposed"): linear._replace(by_row=False),
        ("linear", "gain, bias and z"): linear._replace(ends=2),
        ("grad_input", ""): linear._replace(N=K, K=(N,), by_row=False, masked=p > 0),
    }
    problem = Problem(devices.of(device), dtype, M, K, (N,), (R,), dtype, torch.float32, dropout=p)
    return [
        Job(
            one,
            variant,
            sizes,
            run,
            chain,
            frozen.get(one),
            asked.get((one, variant)),
            getattr(cost, one)(problem),
        )
        for one, variant, run, chain in ways
    ]
