"""Every primitive as compiled for sm_80 and sm_90, in bf16 and fp16, on the emulator.

The interpreter has no bf16, and what a compiler makes of copies, barriers and products it does not
see.
"""

import itertools

import pytest
import torch
from emulator.process import in_emulator
from helpers.against_eager import assert_as_exact_as_eager
from helpers.dropout_masks import SEEDS
from helpers.emulated_device import emulated
from helpers.integer_problems import CHECKS, HALF, assert_rounded_once, exact_drop, whole_numbers
from helpers.triton_interpreter import SEED

from lorafast.engine import philox
from lorafast.engine.backends import triton as backend
from lorafast.engine.kernels.low_rank_add import low_rank_add
from lorafast.engine.kernels.scale_cast import scale_cast
from lorafast.engine.problem import BaseTerm, DownProj, LowRankTerm, UpProjGradSpec

BF16, FP16 = torch.bfloat16, torch.float16
TARGETS = [(90, BF16), (80, BF16), (90, FP16), (80, FP16)]
RANKS = (16, 64, 128, 256)
# grad_input rounds twice where torch multiplies the base in half precision, and row_norm ends with
# torch's square root, which is not rounded correctly.
EXACT = [name for name in CHECKS if name not in ("grad_input", "row_norm")]
# M, N, K, R and how operands lie. No row of 17 or 33 elements is aligned.
SHAPES = [
    ((20, 36, 70, 17), "contiguous"),
    ((70, 130, 257, 12), "sliced"),
    ((5, 17, 33, 3), "transposed"),
    ((33, 70, 72, 100), "apart"),
]
EMPTY = [(0, 3, 4, 2), (3, 0, 4, 2), (0, 0, 0, 1)]


def slow_but(first, *cases):
    """Return parameters of which only the first case is not slow."""
    return [first, *(pytest.param(*case, marks=pytest.mark.slow) for case in cases)]


def whole_cases():
    """Yield a target, primitive and shape each: in bf16 two shapes, in fp16 one."""
    for i, (target, primitive) in enumerate(itertools.product(TARGETS, EXACT)):
        yield (*target, primitive, *SHAPES[i % 4])
        if target[1] == BF16:
            yield (*target, primitive, *SHAPES[(i + 2) % 4])


QUICK = (90, BF16, "grad_project", *SHAPES[0])


@pytest.mark.parametrize(
    ("capability", "dtype", "primitive", "shape", "layout"), slow_but(QUICK, *whole_cases())
)
@in_emulator
def test_whole_numbers_are_exact(capability, dtype, primitive, shape, layout):
    """Every flag: lists of adapters, cores, gains, frozen columns, tensor scalings, dropout."""
    with emulated(capability):
        CHECKS[primitive](backend, dtype, torch.float32, *shape, layout)


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "dtype"), TARGETS)
@in_emulator
def test_no_tokens_no_inputs_no_outputs(capability, dtype):
    with emulated(capability):
        for primitive, shape in itertools.product(EXACT, EMPTY):
            CHECKS[primitive](backend, dtype, torch.float32, *shape, "sliced")
        dx = backend.grad_input(
            [BaseTerm(torch.empty(0, 8, dtype=dtype), torch.randn(8, 16).to(dtype))],
            [LowRankTerm(torch.empty(0, 4, dtype=dtype), torch.randn(4, 16), SEED, HALF)],
        )
    assert dx.shape == (0, 16)


@pytest.mark.parametrize(
    ("capability", "dtype", "accumulate"),
    slow_but((90, BF16, False), *((*target, True) for target in TARGETS)),
)
@in_emulator
def test_low_rank_add(capability, dtype, accumulate):
    for rows, columns, R, layout in (
        (70, 130, 17, "sliced"),
        (65, 136, 16, "contiguous"),
        (1, 33, 3, "transposed"),
        (0, 8, 4, "contiguous"),
    ):
        v, A = (
            whole_numbers(rows, R, dtype, layout),
            whole_numbers(R, columns, torch.float32, layout),
        )
        out = whole_numbers(rows, columns, dtype).contiguous()
        exact = exact_drop(v.double() @ A.double(), HALF) * 2 + accumulate * out.double()
        if not accumulate:
            out.fill_(float("nan"))
        with emulated(capability):
            low_rank_add(out, LowRankTerm(v, A, SEED, HALF), accumulate)
        assert_rounded_once(out, exact)


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "dtype"), TARGETS)
@in_emulator
def test_scale_cast(capability, dtype):
    row_scale = torch.tensor([1.0, 0.5, -2.0, 0.0])[torch.arange(70) % 4]
    for factor, layout, by_row, scaling, multiple in (
        (torch.float32, "sliced", True, 2.5, 8),
        (dtype, "transposed", False, torch.tensor(1.75), 16),
        (torch.float32, "contiguous", True, 1.0, 1),
        (torch.float32, "apart", False, 3.0, 8),
    ):
        F = whole_numbers(70, 33, factor, layout)
        for rows in (None, row_scale):
            with emulated(capability):
                out = scale_cast(F, dtype, scaling, rows, by_row, multiple)
            exact = F.double() * float(scaling) * (1 if rows is None else rows.double()[:, None])
            assert_rounded_once(out[:, :33], exact, dtype)
            assert not out[:, 33:].any()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "dtype", "seed", "p"),
    [
        (*target, seed, p)
        for target, seed, p in zip(TARGETS, SEEDS, (0.05, 0.3, 0.9, 0.0001), strict=True)
    ],
)
@in_emulator
def test_dropped_elements_are_those_of_philox(capability, dtype, seed, p):
    """Every kernel that drops is shown the mask itself: products with ones and unit vectors."""
    seed = torch.tensor([seed])
    for M, K in ((1, 72), (63, 130), (70, 257)):
        kept = philox.keep_mask(seed, p, slice(0, M), K).float() * torch.tensor(philox.scale(p))
        x, columns = torch.ones(M, K, dtype=dtype), torch.arange(0, K, -(-K // 64))
        A = torch.nn.functional.one_hot(columns, K).float()
        rows = torch.arange(0, M, -(-M // 64))
        one_row = torch.nn.functional.one_hot(rows, M).t().to(dtype)
        out = torch.empty(M, K, dtype=dtype)
        with emulated(capability):
            ((h, h_core),) = backend.project(x, [DownProj(A, torch.ones(len(A)), seed, p)])
            (dA,) = backend.grad_project(x, [LowRankTerm(one_row, torch.empty(64, K), seed, p)])
            low_rank_add(out, LowRankTerm(x[:, :1], torch.ones(1, K), seed, p), False)
            dropped = backend.drop(x, seed, p)
        assert_rounded_once(h, kept[:, columns])
        assert_rounded_once(h_core, kept[:, columns])
        assert_rounded_once(dA, kept[rows])
        assert_rounded_once(out, kept)
        assert_rounded_once(dropped, kept)


def check_against_eager(primitive, capability, dtype, *operands):
    """Check the error rule for every result of a primitive."""
    with emulated(capability):
        found = getattr(backend, primitive)(*operands)
    assert_as_exact_as_eager(found, primitive, dtype, *operands)


def normal(*shape, dtype=torch.float32):
    """Return normal numbers, aligned and contiguous: all copies of a kernel are asynchronous."""
    return torch.randn(shape).to(dtype)


TARGETS_AND_RANKS = [
    (*target, R)
    for target in TARGETS
    for R in RANKS
    if target[1] == BF16 or (64 if target[0] == 80 else 128) == R
]


@pytest.mark.parametrize(("capability", "dtype", "R"), slow_but(*TARGETS_AND_RANKS))
@in_emulator
def test_project_in_several_steps(capability, dtype, R):
    for M, K, p in ((80, 784, 0.3), (80, 784, 0.0), (3472, 272, 0.3))[: 3 if R == 64 else 2]:
        down = DownProj(normal(R, K) / K**0.5, None, SEED if p else None, p)
        check_against_eager("project", capability, dtype, normal(M, K, dtype=dtype), [down])


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "dtype", "R"), TARGETS_AND_RANKS)
@in_emulator
def test_grad_project_in_several_steps(capability, dtype, R):
    M, K = 336, 144
    for p in (0.0, 0.3):
        term = LowRankTerm(normal(M, R, dtype=dtype), normal(R, K), SEED if p else None, p)
        x = normal(M, K, dtype=dtype)
        check_against_eager("grad_project", capability, dtype, x, [term])


@pytest.mark.parametrize(("capability", "dtype", "R"), slow_but(*TARGETS_AND_RANKS))
@in_emulator
def test_grad_output_in_several_steps(capability, dtype, R):
    M, N = 272, 320
    dy, kept, h = (normal(M, width, dtype=dtype) for width in (N, N, R))
    for want_v in (True, False):
        spec = UpProjGradSpec(normal(N, R) / R**0.5, h=h, want_v=want_v, want_B=True)
        check_against_eager("grad_output", capability, dtype, dy, [spec], None, kept, True)
    check_against_eager("grad_output", capability, dtype, dy, [], None, kept, True)


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "dtype", "R"), TARGETS_AND_RANKS)
@in_emulator
def test_row_norm_in_several_steps(capability, dtype, R):
    N, K = 208, 336
    W = normal(N, K, dtype=dtype) / K**0.5
    A, B = normal(R, K) / K**0.5, normal(N, R) / R**0.5 * 0.2
    for axis in ("out", "in"):
        check_against_eager("row_norm", capability, dtype, W, A, B, 1.0, axis)
