"""Every primitive of every backend, and a call of the layer where there is next to nothing to compute, each on its own.

Timed by pytest-benchmark and held to nothing: pytest bench/micro.py, or make micro.

No name of a test file, so that the suite neither collects it nor needs pytest-benchmark.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import pytest
import torch

import lorafast
from lorafast import testing
from lorafast.engine import dispatch
from lorafast.engine.kernels import cost
from lorafast.engine.problem import (
    PRIMITIVES,
    BaseTerm,
    DownProj,
    LowRankTerm,
    Problem,
    UpProj,
    UpProjGradSpec,
)
from lorafast.runtime import devices
from lorafast.testing import SHORT, Case, Form

M, R = 2048, 16
SHAPES = ((1024, 4096), (2048, 2048))  # K in, N out
BACKENDS = ("eager", "cpu")
# What meets a dropout mask; to the others p is nothing.
DROPS = ("project", "grad_input", "grad_project")
CPU = torch.device("cpu")


class Operands:
    """One LoRA layer's tensors; factors fp32, as they are trained."""

    def __init__(self, K: int, N: int, dtype: torch.dtype) -> None:
        made = testing.make(Case(Form("lora"), M, N, K, R, dtype), sliced=False)
        self.x, self.dy, self.weight, self.seed = (
            made[name] for name in ("x", "dy", "weight", "seed")
        )
        self.A, self.B = made["lora_A"], made["lora_B"]
        self.h, self.v = torch.randn(M, R).to(dtype), torch.randn(M, R).to(dtype)


Call = Callable[[ModuleType, Operands, float], object]
CALLS: dict[str, Call] = {
    "project": lambda on, o, p: on.project(o.x, [DownProj(o.A, None, o.seed, p)]),
    "linear": lambda on, o, p: on.linear(o.x, o.weight, [UpProj(o.h, o.B, 2.0)]),
    "grad_output": lambda on, o, p: on.grad_output(
        o.dy, [UpProjGradSpec(o.B, 2.0, h=o.h, want_B=True)]
    ),
    "grad_input": lambda on, o, p: on.grad_input(
        [BaseTerm(o.dy, o.weight)], [LowRankTerm(o.v, o.A, o.seed, p)]
    ),
    "grad_project": lambda on, o, p: on.grad_project(o.x, [LowRankTerm(o.v, o.A, o.seed, p)]),
    "row_norm": lambda on, o, p: on.row_norm(o.weight, o.A, o.B, 2.0),
}

CASES = [
    pytest.param(
        primitive, shape, dtype, p, id=f"{primitive}-{shape[0]}x{shape[1]}-{SHORT[dtype]}-p{p:g}"
    )
    for primitive in PRIMITIVES
    for shape in SHAPES
    for dtype in (torch.float32, torch.bfloat16)
    for p in ((0.0, 0.05) if primitive in DROPS else (0.0,))
]


@functools.lru_cache(maxsize=1)
def operands(K: int, N: int, dtype: torch.dtype) -> Operands:
    """Kept while the next benchmark asks for the same."""
    torch.manual_seed(0)
    return Operands(K, N, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("primitive", "shape", "dtype", "p"), CASES)
def test_primitive(
    primitive: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
    p: float,
    backend: str,
    benchmark,
    request: pytest.FixtureRequest,
) -> None:
    """Backends of one case stand together; its flops and least bytes are kept beside the times."""
    K, N = shape
    problem = Problem(devices.of(CPU), dtype, M, K, (N,), (R,), dtype, torch.float32, dropout=p)
    # row_norm sees no activation, nor a mask.
    asked = replace(problem, M=0, gain="out") if primitive == "row_norm" else problem
    if why := dispatch.why_not(backend, primitive, asked):
        pytest.skip(f"{backend}: {'; '.join(why)}")
    benchmark.group = request.node.callspec.id.removesuffix(f"-{backend}")
    benchmark.extra_info |= getattr(cost, primitive)(problem)._asdict()
    benchmark(CALLS[primitive], dispatch.load(backend), operands(K, N, dtype), p)


LAYERS: dict[str, Callable[[], torch.nn.Module]] = {
    "frozen": lambda: torch.nn.Linear(16, 16).requires_grad_(False),
    "lora": lambda: lorafast.Linear(16, 16, adapter=lorafast.LoRA(r=4)),
    "lora-p": lambda: lorafast.Linear(16, 16, adapter=lorafast.LoRA(r=4, dropout=0.05)),
    "lamda": lambda: lorafast.Linear(16, 16, adapter=lorafast.LaMDA(r=4)),
    "dora": lambda: lorafast.Linear(16, 16, adapter=lorafast.DoRA(r=4)),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_call(layer: str, benchmark) -> None:
    """Forward, training, of 4 tokens 16 wide: what is left is Python, torch's and ours."""
    torch.manual_seed(0)
    called, x = LAYERS[layer](), torch.randn(4, 16, requires_grad=True)
    if hasattr(called, "lora_B"):
        # At its start an adapter may be spared work.
        torch.nn.init.normal_(called.lora_B)
    benchmark.group = "call 4x16x16"
    # Many calls a round: one alone is as short as the clock's own ticks.
    benchmark.pedantic(called, (x,), iterations=200, rounds=100, warmup_rounds=5)
