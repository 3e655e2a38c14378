"""Micro-benchmarks: every primitive of every backend, and a call of every kind of layer.

pytest-benchmark times them, and nothing is asserted: run pytest bench/micro.py, or make micro. The
file has no name of a test file, so that the test suite neither collects it nor needs
pytest-benchmark.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import pytest
import torch

import lorafast
from lorafast import functional, testing
from lorafast.engine import dispatch
from lorafast.engine.kernels import cost
from lorafast.engine.multi_adapter import Factors
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
# The primitives that draw a dropout mask.
DROPS = ("project", "grad_input", "grad_project")
CPU = torch.device("cpu")


class Operands:
    """The tensors of a LoRA layer; A and B are fp32, as in training."""

    def __init__(self, K: int, N: int, dtype: torch.dtype) -> None:
        made = testing.make(Case(Form("lora"), M, N, K, R, dtype), sliced=False)
        self.x, self.dy, self.weight, self.seed = (
            made[name] for name in ("x", "dy", "weight", "seed")
        )
        self.A, self.B = made["lora_A"], made["lora_B"]
        self.h, self.v = torch.randn(M, R).to(dtype), torch.randn(M, R).to(dtype)


def project(backend: ModuleType, o: Operands, p: float) -> object:
    """Call project with dropout p."""
    return backend.project(o.x, [DownProj(o.A, None, o.seed, p)])


def linear(backend: ModuleType, o: Operands, p: float) -> object:
    """Call linear."""
    return backend.linear(o.x, o.weight, [UpProj(o.h, o.B, 2.0)])


def grad_output(backend: ModuleType, o: Operands, p: float) -> object:
    """Call grad_output with the gradient of B."""
    return backend.grad_output(o.dy, [UpProjGradSpec(o.B, 2.0, h=o.h, want_B=True)])


def grad_input(backend: ModuleType, o: Operands, p: float) -> object:
    """Call grad_input with dropout p."""
    terms = [BaseTerm(o.dy, o.weight)]
    return backend.grad_input(terms, [LowRankTerm(o.v, o.A, o.seed, p)])


def grad_project(backend: ModuleType, o: Operands, p: float) -> object:
    """Call grad_project with dropout p."""
    return backend.grad_project(o.x, [LowRankTerm(o.v, o.A, o.seed, p)])


def row_norm(backend: ModuleType, o: Operands, p: float) -> object:
    """Call row_norm by row."""
    return backend.row_norm(o.weight, o.A, o.B, 2.0)


# The call of each primitive, with a backend, the operands and the dropout.
CALLS: dict[str, Callable[[ModuleType, Operands, float], object]] = {
    call.__name__: call
    for call in (project, linear, grad_output, grad_input, grad_project, row_norm)
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
    """Return the operands, cached because consecutive benchmarks use the same."""
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
    """Time one primitive of one backend, grouped by case.

    Its flops and least bytes are stored with the times.
    """
    K, N = shape
    problem = Problem(devices.of(CPU), dtype, M, K, (N,), (R,), dtype, torch.float32, dropout=p)
    # row_norm reads no activation and no mask.
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
    """Time a forward call in training mode on 4 tokens of 16 features.

    The arithmetic takes next to no time: what is measured is the host's work, torch's and ours.
    """
    torch.manual_seed(0)
    called, x = LAYERS[layer](), torch.randn(4, 16, requires_grad=True)
    if hasattr(called, "lora_B"):
        # With B = 0, as at the start of training, an adapter may skip work.
        torch.nn.init.normal_(called.lora_B)
    benchmark.group = "call 4x16x16"
    # Many calls per round, because one is as short as the clock's resolution.
    benchmark.pedantic(called, (x,), iterations=200, rounds=100, warmup_rounds=5)


@pytest.mark.parametrize("layer", LAYERS)
def test_step(layer: str, benchmark) -> None:
    """Time a forward call and its backward on 4 tokens of 16 features, as test_call does."""
    torch.manual_seed(0)
    called, x, dy = LAYERS[layer](), torch.randn(4, 16, requires_grad=True), torch.randn(4, 16)
    if hasattr(called, "lora_B"):
        torch.nn.init.normal_(called.lora_B)
    benchmark.group = "step 4x16x16"
    benchmark.pedantic(lambda: called(x).backward(dy), iterations=200, rounds=100, warmup_rounds=5)


FUNCTIONS = ("linear", "several-of-one")


@pytest.mark.parametrize("function", FUNCTIONS)
def test_function(function: str, benchmark) -> None:
    """Time lorafast.linear, and functional.several with the same adapter as its only one."""
    torch.manual_seed(0)
    x, A, B = (torch.randn(*size, requires_grad=True) for size in ((4, 16), (4, 16), (16, 4)))
    weight, pairs = torch.randn(16, 16), [Factors(A, B, scaling=2.0)]

    def linear() -> torch.Tensor:
        return lorafast.linear(x, weight, None, A, B, scaling=2.0)

    def several() -> torch.Tensor:
        return functional.several(x, weight, None, pairs)

    benchmark.group = "function 4x16x16"
    called = linear if function == "linear" else several
    benchmark.pedantic(called, iterations=200, rounds=100, warmup_rounds=5)
