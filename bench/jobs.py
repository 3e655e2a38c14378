"""The Triton kernels one primitive at a time: operands, the same by stock torch in any dtype, and what a route may change."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from lorafast import arch, philox
from lorafast.backends import triton
from lorafast.kernels import cost, routes
from lorafast.problem import Down, LowRank, Problem, Return, Segment, Up

PRODUCTS = ("linear", "grad_input")
STREAMS = ("project", "grad_output", "grad_project", "row_norm")


class Sizes(NamedTuple):
    """One layer: M tokens, K in, N out, R rank, and the adapter's dropout."""

    M: int
    K: int
    N: int
    R: int
    p: float


class Job(NamedTuple):
    """One primitive on one layer. run: by our kernels; chain: by stock torch in a dtype, both giving tensors in the same order.

    frozen: the base product alone, for a primitive that has one; asked: what its routes are chosen by; cost: of one run.
    """

    primitive: str
    sizes: Sizes
    run: Callable[[], list[torch.Tensor]]
    chain: Callable[[torch.dtype], list[torch.Tensor]]
    frozen: Callable[[], torch.Tensor] | None
    asked: routes.Asked | None
    cost: cost.Cost


def jobs(sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int) -> list[Job]:
    """Every primitive of one LoRA layer, on the same random operands; factors fp32, as they are trained."""
    M, K, N, R, p = sizes
    random = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, by: float = 1.0, of: torch.dtype = dtype) -> torch.Tensor:
        return (torch.randn(*shape, generator=random, device=device) * by).to(of)

    x, dy, W = normal(M, K), normal(M, N), normal(N, K, by=K**-0.5)
    A, B = normal(R, K, by=K**-0.5, of=torch.float32), normal(N, R, of=torch.float32)
    h, v = normal(M, R), normal(M, R, by=N**-0.5)
    mask = torch.tensor([seed + 1], device=device) if p else None

    def drop(t: torch.Tensor) -> torch.Tensor:
        return philox.dropped(t, mask, p) if p else t

    back = Return(B, h=h, want_B=True)
    ours = {
        "linear": lambda: [triton.linear(x, W, [Up(h, B)])[0]],
        "grad_input": lambda: [triton.grad_input([Segment(dy, W)], [LowRank(v, A, mask, p)])],
        "project": lambda: [triton.project(x, [Down(A, None, mask, p)])[0][0]],
        "grad_output": lambda: list(triton.grad_output(dy, [back]).adapters[0][:2]),
        "grad_project": lambda: triton.grad_project(x, [LowRank(v, A, mask, p)]),
        "row_norm": lambda: [triton.row_norm(W, A, B)],
    }
    chains = {
        "linear": lambda cast: [F.linear(x.to(cast), W.to(cast)) + F.linear(h.to(cast), B.to(cast))],
        "grad_input": lambda cast: [dy.to(cast) @ W.to(cast) + drop(v.to(cast) @ A.to(cast))],
        "project": lambda cast: [F.linear(drop(x.to(cast)), A.to(cast))],
        "grad_output": lambda cast: [dy.to(cast) @ B.to(cast), dy.to(cast).t() @ h.to(cast)],
        "grad_project": lambda cast: [v.to(cast).t() @ drop(x.to(cast))],
        "row_norm": lambda cast: [(W.to(cast) + B.to(cast) @ A.to(cast)).norm(dim=1)],
    }
    frozen = {"linear": lambda: F.linear(x, W), "grad_input": lambda: dy @ W}
    name, aligned = arch.of(device).name, K * dtype.itemsize % 16 == N * dtype.itemsize % 16 == 0
    asked = {
        "linear": routes.Asked(M, N, (K,), R, dtype, name, aligned=aligned),
        "grad_input": routes.Asked(M, K, (N,), R, dtype, name, by_row=False, masked=p > 0, aligned=aligned),
    }
    problem = Problem(arch.of(device), dtype, M, K, (N,), (R,), dtype, torch.float32, dropout=p)
    return [
        Job(one, sizes, ours[one], chains[one], frozen.get(one), asked.get(one), getattr(cost, one)(problem))
        for one in (*PRODUCTS, *STREAMS)
    ]
