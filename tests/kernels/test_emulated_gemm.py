"""The GEMM as compiled for sm_80 and sm_90, on the emulator: every form, tile and route."""

import pytest
import torch
from emulator.process import in_emulator
from helpers.emulated_device import emulated
from helpers.triton_interpreter import SEED, within_twice

from lorafast.engine import philox
from lorafast.engine.backends import eager
from lorafast.engine.backends import triton as backend
from lorafast.engine.kernels import gemm_routing, launch
from lorafast.engine.problem import BaseTerm, LowRankTerm, UpProj

BF16, FP16 = torch.bfloat16, torch.float16
TARGETS = [(90, BF16), (80, BF16), (90, FP16), (80, FP16)]
P = 0.3


def normal(*shape, dtype=torch.float32, by_row=True):
    """Return normal numbers, dense along rows or along columns."""
    values = torch.randn(shape).to(dtype)
    return values if by_row else values.t().contiguous().t()


def routes_of(call):
    """Return every route of the GEMM that a call can take; more programs, fewer and split sums."""
    queries = []

    def listen(query):
        queries.append(query)
        return gemm_routing.Route("base first")

    pick, gemm_routing.pick = gemm_routing.pick, listen
    try:
        call()
    finally:
        gemm_routing.pick = pick
    routes = [route for route in gemm_routing.candidates(queries[0]) if route.fused]
    fewer = [route._replace(programs=2) for route in routes if route.programs > 2]
    return [*routes, *fewer]


def check_routes(capability, form, call, stock, truth, dtype, smallest=False):
    """Check the error rule for a call by every route of a form, or by that of the smallest tile."""
    with emulated(capability, fused=False):
        routes = [route for route in routes_of(call) if route.form == form]
        assert routes
        for route in routes[-1:] if smallest else routes:
            with gemm_routing.forcing(route):
                found = call()
            for one, other, true in zip(found, stock, truth, strict=True):
                within_twice([one], [other], [true], dtype)


def linear_case(dtype, by_row, ragged):
    """Return linear with an adapter, a gain, a bias and z: as a call, torch's, and the truth."""
    M, N, K, R = (70, 130, 257, 12) if ragged else (80, 272, 592, 16)
    x, W, h = normal(M, K, dtype=dtype), normal(N, K, dtype=dtype, by_row=by_row), normal(M, R)
    h, B, gain, bias = h.to(dtype), normal(N, R), torch.rand(N) + 0.5, torch.rand(N)

    def call(backend=backend, wide=lambda t: t):
        up = UpProj(wide(h), wide(B), 1.7)
        return backend.linear(wide(x), wide(W), [up], wide(gain), wide(bias), True)

    return call, call(eager), call(eager, torch.Tensor.double)


def grad_input_case(dtype, by_row, ragged, drops, many):
    """Return grad_input of one or two bases and adapters: as a call, torch's, and the truth."""
    M, N, K, R = (70, 130, 257, 12) if ragged else (80, 272, 592, 16)
    dy, W = normal(M, N, dtype=dtype), normal(N, K, dtype=dtype, by_row=not by_row) / N**0.5
    v, A, p = normal(M, R, dtype=dtype), normal(R, K), P if drops else 0.0

    def call(backend=backend, wide=lambda t: t):
        bases = [BaseTerm(wide(dy), wide(W))] * (2 if many else 1)
        terms = [LowRankTerm(wide(v), wide(A), SEED if drops else None, p)]
        terms += [LowRankTerm(wide(v), wide(A))] * many
        return [backend.grad_input(bases, terms)]

    return call, call(eager), call(eager, torch.Tensor.double)


LINEAR = [
    (capability, dtype, form, by_row, ragged)
    for i, (capability, dtype) in enumerate(TARGETS)
    for form in (("tma", "pointers") if capability == 90 else ("pointers",))
    for by_row in (True, False)
    for ragged in ((False,) if form == "tma" else (bool((i + by_row) % 2),))
]
# Of a base and an adapter, or of several, with dropout or without; fp16 takes one of them.
GRAD_INPUT = [
    (capability, dtype, form, by_row, ragged and form == "pointers", drops, many)
    for capability, dtype in TARGETS
    for form in (("tma", "pointers") if capability == 90 else ("pointers",))
    for by_row, ragged, drops, many in (
        (True, False, True, False), (False, True, False, False),
        (False, False, True, True), (True, True, False, True),
    )
    if dtype == BF16 or (drops and not many)
]  # fmt: skip


@pytest.mark.parametrize("form", ["tma", "pointers"])
@in_emulator
def test_linear_by_the_smallest_tile(form):
    check_routes(90, form, *linear_case(BF16, True, False), BF16, smallest=True)


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "dtype", "form", "by_row", "ragged"), LINEAR)
@in_emulator
def test_linear_by_every_route(capability, dtype, form, by_row, ragged):
    check_routes(capability, form, *linear_case(dtype, by_row, ragged), dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "dtype", "form", "by_row", "ragged", "drops", "many"), GRAD_INPUT
)
@in_emulator
def test_grad_input_by_every_route(capability, dtype, form, by_row, ragged, drops, many):
    case = grad_input_case(dtype, by_row, ragged, drops, many)
    check_routes(capability, form, *case, dtype)


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "dtype"), TARGETS)
@in_emulator
def test_dropped_elements_are_those_of_philox(capability, dtype):
    M, K = 130, 136
    kept = philox.keep_mask(SEED, P, slice(0, M), K).float() * torch.tensor(philox.scale(P))
    terms = [LowRankTerm(torch.ones(M, 8, dtype=dtype), torch.full((8, K), 0.125), SEED, P)]
    bases = [BaseTerm(torch.zeros(M, 72, dtype=dtype), normal(72, K, dtype=dtype))]
    with emulated(capability, fused=False):
        routes = routes_of(lambda: backend.grad_input(bases, terms))
        assert {route.form for route in routes} >= {"pointers"} | (
            {"tma"} if capability == 90 else set()
        )
        for route in routes:
            with gemm_routing.forcing(route):
                assert torch.equal(backend.grad_input(bases, terms), kept.to(dtype)), route


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [BF16, FP16])
@in_emulator
def test_cached_descriptors_are_right_when_addresses_come_back(dtype):
    def cached(t, block):
        return launch._cached_descriptor(t.data_ptr(), t.dtype, tuple(t.shape), t.stride(0), block)

    plain, launch.descriptor = launch.descriptor, cached
    try:
        for M, N, K in ((64, 128, 136), (64, 136, 128), (130, 264, 72), (64, 128, 136)):
            x, W = normal(M, K, dtype=dtype), normal(N, K, dtype=dtype)
            h, B = normal(M, 16, dtype=dtype), normal(N, 16, dtype=dtype)

            def call(backend=backend, wide=lambda t: t, operands=(x, W, h, B)):
                x, W, h, B = map(wide, operands)
                return [backend.linear(x, W, [UpProj(h, B)])[0]]

            truth = call(eager, torch.Tensor.double)
            check_routes(90, "tma", call, call(eager), truth, dtype)
    finally:
        launch.descriptor = plain
