"""The CUDA kernels as nvcc compiles them for sm_80 and sm_90, on the emulator."""

import itertools
from unittest import mock

import pytest
import torch
from helpers.against_eager import assert_as_exact_as_eager
from helpers.cuda_compiler import skip_without_nvcc
from helpers.dropout_masks import ROWS, SEEDS
from helpers.emulated_cuda import emulating
from helpers.integer_problems import (
    CHECKS,
    HALF,
    assert_root,
    assert_rounded_once,
    exact_drop,
    exact_gains,
    whole_numbers,
)
from helpers.triton_interpreter import SEED, within_twice

from lorafast.engine import cuda_kernels, formula, philox
from lorafast.engine.backends import cuda as backend
from lorafast.engine.problem import DownProj, Gain, LowRankTerm, UpProj, UpProjGradSpec

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
HALVES = [(90, BF16), (80, BF16), (90, FP16), (80, FP16)]
TARGETS = [*HALVES, (90, FP32), (80, FP32)]
PRIMITIVES = ("project", "grad_project", "grad_output", "row_norm")
# M, N, K, R, how operands lie, and the splits of a sum. No row of 17 or 33 elements is aligned.
SHAPES = [
    ((20, 36, 70, 17), "contiguous", 1),
    ((70, 130, 257, 12), "sliced", 3),
    ((5, 17, 33, 3), "transposed", 1),
    ((33, 72, 264, 100), "contiguous", 2),
    ((70, 40, 200, 16), "apart", 2),
    ((33, 96, 72, 250), "contiguous", 1),
]
EMPTY = [(0, 3, 4, 2), (3, 0, 4, 2), (1, 1, 1, 1)]


@pytest.fixture(autouse=True)
def compiler():
    """Nothing of this file runs without nvcc."""
    skip_without_nvcc()


def slow_but(first, *cases):
    """Return parameters of which only the first case is not slow."""
    return [first, *(pytest.param(*case, marks=pytest.mark.slow) for case in cases)]


def some_shapes(*primitives):
    """Yield a target, a primitive and a shape: in bf16 two shapes of each, else one."""
    for i, (target, *primitive) in enumerate(itertools.product(TARGETS, *primitives)):
        for shape in SHAPES[i % 3 :: 3] if target[1] == BF16 else [SHAPES[i % 6]]:
            yield (*target, *primitive, *shape)


QUICK = (90, BF16, "project", *SHAPES[2])


@pytest.mark.parametrize(
    ("capability", "dtype", "primitive", "shape", "layout", "splits"),
    slow_but(QUICK, *some_shapes(PRIMITIVES)),
)
def test_whole_numbers_are_exact(capability, dtype, primitive, shape, layout, splits):
    with emulating(capability, splits):
        CHECKS[primitive](backend, dtype, torch.float32, *shape, layout)


@pytest.mark.parametrize(
    ("capability", "dtype"), slow_but(*(target for target in TARGETS if target[1] != FP16))
)
def test_u_of_two_blocks_of_columns(capability, dtype):
    """Its sums are too many for a d_core that is exact in fp16."""
    with emulating(capability, 2):
        CHECKS["grad_output"](backend, dtype, FP32, 23, 520, 8, 12, "contiguous")


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_whole_numbers_in_tf32(capability):
    """They are few enough for its ten bits."""
    for primitive, (shape, layout, splits) in zip(PRIMITIVES, SHAPES, strict=False):
        with emulating(capability, splits, tf32=True):
            CHECKS[primitive](backend, FP32, FP32, *shape, layout)


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "dtype"), TARGETS)
def test_no_tokens_no_outputs_and_one_of_each(capability, dtype):
    with emulating(capability, 2):
        for primitive, shape in itertools.product(PRIMITIVES, EMPTY):
            CHECKS[primitive](backend, dtype, torch.float32, *shape, "sliced")


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "dtype", "shape", "layout", "splits"), list(some_shapes()))
def test_low_rank_add(capability, dtype, shape, layout, splits):
    """dx with a mask, added to or written; without one; and y with gain, bias, both and z."""
    M, N, _, R = shape
    h, F = whole_numbers(M, R, dtype, layout, 3), whole_numbers(N, R, torch.float32, layout, 3)
    before, product = whole_numbers(M, N, dtype), h.double() @ F.double().t()
    for p, adds in ((HALF, True), (HALF, False), (0.0, True)):
        out = before.clone() if adds else torch.empty(M, N, dtype=dtype)
        with emulating(capability, splits):
            cuda_kernels.low_rank_add(out, h, F, SEED, p, adds)
        exact = exact_drop(product, p) * philox.scale(p) + adds * before.double()
        assert_rounded_once(out, exact)
    gain, bias = exact_gains(N), torch.randint(-15, 16, (N,)).to(dtype)
    for own_gain, own_bias in ((gain, bias), (None, bias), (gain, None)):
        out, inner = before.clone(), torch.empty(M, N, dtype=dtype)
        with emulating(capability, splits):
            cuda_kernels.low_rank_add(
                out, h, F, scaling=torch.tensor(2.5), gain=own_gain, bias=own_bias, inner=inner
            )
        z = before.double() + 2.5 * product
        assert_rounded_once(inner, z)
        exact = z if own_gain is None else z * own_gain.double()
        assert_rounded_once(out, exact if own_bias is None else exact + own_bias.double())


# M, N and R of factors that low_rank_add reads as they are.
RAW = [(33, 72, 12), (70, 40, 16), (5, 8, 4), (40, 264, 64), (20, 96, 32), (33, 104, 24)]
RAW_CASES = [
    (*target, *case)
    for i, (target, *case) in enumerate(itertools.product(TARGETS, (True, False), RAW))
    if i % 5 == 0 and (target[1] != FP32 or case[1][2] <= 32)
]


@pytest.mark.parametrize(("capability", "dtype", "across", "sizes"), slow_but(*RAW_CASES))
def test_low_rank_add_with_a_factor_as_it_is(capability, dtype, across, sizes):
    """B by rows, for y; A across, for dx. Nothing is copied, and NaN lies around the factor."""
    M, N, R = sizes
    h, before = whole_numbers(M, R, dtype, most=3), whole_numbers(M, N, dtype)
    around = torch.full((R + 1, N + 4) if across else (N + 1, R + 4), torch.nan)
    F = around[:R, :N].t() if across else around[:N, :R]
    F.copy_(whole_numbers(N, R, FP32, most=3))
    product, s = h.double() @ F.double().t(), 1.0 if across else 2.5
    gain, bias = exact_gains(N), torch.randint(-15, 16, (N,)).float()
    calls = [(p, adds, None, None) for p, adds in ((HALF, False), (HALF, True), (0.0, False))]
    if not across:
        calls = [(0.0, False, None, bias), (0.0, True, gain, bias), (0.0, True, None, None)]
    for p, adds, own_gain, own_bias in calls:
        out, inner = before.clone(), None if own_gain is None else torch.empty_like(before)
        copied = mock.patch.object(cuda_kernels, "scale", side_effect=AssertionError("a copy"))
        with emulating(capability, 1 + adds), copied:
            cuda_kernels.low_rank_add(
                out, h, F, SEED, p, adds, torch.tensor(s) if adds else s, None, own_gain, own_bias,
                inner,
            )  # fmt: skip
        z = s * exact_drop(product, p) * philox.scale(p) + adds * before.double()
        if inner is not None:
            assert_rounded_once(inner, z)
        exact = z if own_gain is None else z * own_gain.double()
        assert_rounded_once(out, exact if own_bias is None else exact + own_bias.double())
    # What is infinite is not multiplied by the zeros of ranks beyond the last.
    F[0, -1], h[:, -1] = torch.inf, 1
    out = before.clone()
    with emulating(capability):
        cuda_kernels.low_rank_add(out, h, F, accumulate=False)
    assert out[:, 0].isinf().all()
    assert out[:, 1:].isfinite().all()


ACROSS_CASES = [
    (*target, *case)
    for i, (target, case) in enumerate(
        itertools.product(TARGETS, [(40, 72, 12), (33, 424, 16), (5, 8, 4), (33, 104, 64)])
    )
    if i % 3 == 0 and (target[1] != FP32 or case[2] <= 32)
]


@pytest.mark.parametrize(("capability", "dtype", "N", "K", "R"), slow_but(*ACROSS_CASES))
def test_row_norm_with_a_factor_as_it_is(capability, dtype, N, K, R):
    """Nothing is copied, and NaN lies around A; what is infinite stays in its column."""
    W, B = whole_numbers(N, K, dtype, most=3), whole_numbers(N, R, FP32, most=3)
    around = torch.full((R + 1, K + 4), torch.nan)
    A = around[:R, :K]
    A.copy_(whole_numbers(R, K, FP32, most=3))
    exact = (W.double() + 2 * B.double() @ A.double()).square().sum(1)
    copied = mock.patch.object(cuda_kernels, "scale", side_effect=AssertionError("a copy"))
    for splits in (1, 2):
        with emulating(capability, splits), copied:
            assert_root(backend.row_norm(W, A, B, 2.0), exact)
    A[-1, -1], B[:, -1] = torch.inf, 1
    with emulating(capability), copied:
        assert backend.row_norm(W, A, B).isinf().all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "dtype", "seed", "p"),
    [
        (*target, seed, p)
        for target, seed, p in zip(
            TARGETS, (*SEEDS, 9, 2**40), (0.05, 0.3, 0.9, 0.0001, 0.5, 0.05), strict=True
        )
    ],
)
def test_dropped_elements_are_those_of_philox(capability, dtype, seed, p):
    """Every kernel that drops is shown the mask itself: products with ones and unit vectors."""
    seed = torch.tensor([seed])
    for M, K in ((1, 72), (63, 130), (70, 257)):
        kept = philox.keep_mask(seed, p, slice(0, M), K).float() * torch.tensor(philox.scale(p))
        x, columns = torch.ones(M, K, dtype=dtype), torch.arange(0, K, -(-K // 64))
        A = torch.nn.functional.one_hot(columns, K).float()
        rows = torch.arange(0, M, -(-M // 64))
        one_row = torch.nn.functional.one_hot(rows, M).t().to(dtype)
        with emulating(capability, 2):
            ((h, h_core),) = backend.project(x, [DownProj(A, torch.ones(len(A)), seed, p)])
            (dA,) = backend.grad_project(x, [LowRankTerm(one_row, torch.empty(64, K), seed, p)])
            dropped, out = backend.drop(x, seed, p), torch.empty(M, K, dtype=dtype)
            cuda_kernels.low_rank_add(out, x[:, :1], torch.ones(K, 1), seed, p, False)
            added = torch.ones(M, K, dtype=dtype)
            cuda_kernels.low_rank_add(added, x[:, :1], torch.ones(K, 1), seed, p)
        assert_rounded_once(out, kept)
        assert_rounded_once(added, 1 + kept.double())
        assert_rounded_once(h, kept[:, columns])
        assert_rounded_once(h_core, kept[:, columns])
        assert_rounded_once(dA, kept[rows])
        assert_rounded_once(dropped, kept)


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "dtype"), TARGETS)
@pytest.mark.parametrize("layout", ["contiguous", "sliced", "transposed"])
def test_drop_of_late_rows_and_in_place(capability, dtype, layout):
    for (first_row, K), p in zip(ROWS, (0.05, 0.5, 0.9, 1 / 65536, 0.3, 0.01), strict=True):
        x, seed = whole_numbers(5, K, dtype, layout), torch.tensor([2**63 - 2])
        kept = philox.keep_mask(seed, p, slice(first_row, first_row + 5), K)
        x.masked_fill_(~kept, torch.nan)
        part = whole_numbers(5, K, torch.float32, layout)
        dropped, added = torch.empty(5, K, dtype=dtype), torch.ones(5, K, dtype=dtype)
        with emulating(capability):
            cuda_kernels.drop_into(dropped, x, seed, p, first_row)
            cuda_kernels.drop_into(added, part, seed, p, first_row, scaled=False, accumulate=True)
        assert torch.equal(dropped, torch.where(kept, x * philox.scale(p), 0.0).to(dtype))
        assert torch.equal(added, (1 + torch.where(kept, part, 0.0)).to(dtype))


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "dtype"), TARGETS)
def test_scale(capability, dtype):
    row_scale = torch.tensor([1.0, 0.5, -2.0, 0.0])[torch.arange(70) % 4]
    column_scale = torch.tensor([2.0, -1.0, 0.25])[torch.arange(40) % 3].to(dtype)
    for factor, layout, scaling, rows, width in (
        (torch.float32, "sliced", 2.5, 72, 48),
        (dtype, "transposed", torch.tensor(1.75), 70, 40),
        (dtype, "contiguous", 3.0, 70, 40),
        (torch.float32, "apart", 1.0, 70, 41),
    ):
        F = whole_numbers(70, 40, factor, layout)
        for down, right in ((None, None), (row_scale, None), (row_scale, column_scale)):
            with emulating(capability):
                out = cuda_kernels.scale(F, dtype, rows, width, scaling, down, right)
            exact = F.double() * float(scaling)
            exact = exact if down is None else exact * down.double()[:, None]
            exact = exact if right is None else exact * right.double()
            assert_rounded_once(out[:70, :40], exact, dtype)
            assert not out[70:].any()
            assert not out[:, 40:].any()


@pytest.mark.parametrize("dtype", [FP32, torch.float64], ids=str)
def test_vectors_of_any_strides_and_dtypes(dtype):
    """Kernels get no strides of vectors, and read three dtypes."""
    M, N, K, R = 9, 24, 16, 4
    x, W, h, dy = (whole_numbers(*s, BF16, most=3) for s in ((M, K), (N, K), (M, R), (M, N)))
    B, A = whole_numbers(N, R, dtype, most=3), whole_numbers(R, K, FP32, most=3)
    gain, scale = (torch.tensor([1.0, 7, 2, 7, 4, 7, 0.5, 7] * 6, dtype=dtype)[::2] for _ in "gs")
    bias = torch.tensor([3.0], dtype=dtype).expand(N)
    core = torch.tensor([1.0, 9, 2, 9, 0.5, 9, 4, 9], dtype=dtype)[::2]
    spec = UpProjGradSpec(B, 1.0, scale, core, h, want_B=True, want_out_scale=True)
    with emulating(90):
        y, _ = backend.linear(x, W, [UpProj(h, B, 1.0, scale)], gain, bias)
        ((_, h_core),) = backend.project(x, [DownProj(A, core)])
        found = backend.grad_output(dy, [spec], gain).adapters[0]
    wide = {name: value.double() for name, value in locals().items() if torch.is_tensor(value)}
    up = wide["h"] @ (wide["scale"][:, None] * wide["B"]).t()
    exact = wide["gain"] * (wide["x"] @ wide["W"].t() + up) + wide["bias"]
    assert (y.double() - exact).abs().max() <= exact.abs().max() / 128
    h_exact = (wide["x"] @ wide["A"].t()).bfloat16().double() * wide["core"]
    assert torch.equal(h_core, h_exact.bfloat16())
    P = (wide["gain"] * wide["dy"]).t() @ (wide["h"] * wide["core"])
    torch.testing.assert_close(found.dB.double(), wide["scale"][:, None] * P)
    torch.testing.assert_close(found.d_out_scale.double(), (P * wide["B"]).sum(1))


@pytest.mark.parametrize("n", [1, 300])
def test_gains_and_their_gradients_are_torchs(n):
    """Bit for bit, with a quotient of 0 by 0, infinities and NaN."""
    torch.manual_seed(n)
    special = torch.tensor([0.0, -0.0, float("inf"), float("nan"), 3.0])
    magnitude, norm, dot = (torch.randn(2, n)[0] for _ in range(3))
    if n > 1:
        for one, repeated in ((magnitude, 1), (norm, 5), (dot, 25)):
            one[:125] = special.repeat_interleave(repeated).repeat(25 // repeated)
    magnitude = torch.stack([magnitude, dot], 1).bfloat16()[:, 0]
    gain, found = formula.gain_of(magnitude, norm), []
    with emulating(90):
        found.append(backend.gain_of(magnitude, norm))
        for by_gain, want_norm in itertools.product((False, True), repeat=2):
            found.append(backend.gain_grads(dot, gain, norm, by_gain, want_norm))
    torch.testing.assert_close(found[0], gain, rtol=0, atol=0, equal_nan=True)
    for i, (by_gain, want_norm) in enumerate(itertools.product((False, True), repeat=2)):
        wanted = formula.gain_grads(dot, gain, norm, by_gain, want_norm)
        for one, other in zip(found[1 + i], wanted, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("capability", "dtype"), slow_but(*HALVES))
def test_a_gain_that_kernels_divide(capability, dtype):
    """What they make of m and a norm, some of it 0, is what gain_of and gain_grads make."""
    M, N, R = 24, 520, 8
    dy, kept, h = (whole_numbers(M, width, dtype, most=3) for width in (N, N, R))
    spec = UpProjGradSpec(whole_numbers(N, R, FP32, most=3), 2.0, None, None, h, want_B=True)
    m, norm = torch.randn(N, dtype=torch.bfloat16), torch.randn(N) * (torch.arange(N) % 7 > 0)
    gain = formula.gain_of(m, norm)
    for by_gain, want_norm in ((True, True), (False, False), (None, False)):
        with emulating(capability, 2):
            plain = backend.grad_output(dy, [spec], gain, kept)
            found = backend.grad_output(dy, [spec], Gain(m, norm, by_gain, want_norm), kept)
        for one, other in zip(plain.adapters[0], found.adapters[0], strict=True):
            assert (one is None and other is None) or torch.equal(one, other)
        assert torch.equal(found.gain, gain)
        assert torch.equal(found.dot, plain.dot)
        assert plain.gain is plain.of_gain is None
        assert (found.of_gain is None) == (by_gain is None)
        if by_gain is not None:
            exact = formula.gain_grads(found.dot, gain, norm, by_gain, want_norm)
            torch.testing.assert_close(found.of_gain, exact, rtol=0, atol=0)


@pytest.mark.parametrize(("capability", "dtype"), slow_but(*TARGETS))
def test_gains_of_more_columns_than_a_block_holds(capability, dtype):
    """They lie in shared memory, of 64 steps at once."""
    M, N, R = 3, 2 * 2048 + 40, 4
    h, before, F = (whole_numbers(*s, dtype, most=3) for s in ((M, R), (M, N), (N, R)))
    m, norm = torch.randint(-3, 4, (N,)).bfloat16(), torch.arange(N) % 3 - 1.0
    bias, out, inner = whole_numbers(1, N, FP32)[0], before.clone(), torch.empty_like(before)
    with emulating(capability, 1):
        cuda_kernels.low_rank_add(out, h, F, gain=Gain(m, norm), bias=bias, inner=inner)
    z = before.double() + h.double() @ F.double().t()
    assert_rounded_once(inner, z)
    assert_rounded_once(out, formula.gain_of(m, norm).double() * z + bias.double())


def normal(*shape, dtype=torch.float32):
    """Return normal numbers, aligned and contiguous."""
    return torch.randn(shape).to(dtype)


RANKS = [(90, BF16, R) for R in (8, 16, 32, 64, 128, 256)]
RANKS += [(80, BF16, 16), (80, BF16, 128), (90, FP16, 16), (80, FP16, 64), (90, FP32, 16)]


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "dtype", "R"), RANKS)
def test_project_in_several_steps(capability, dtype, R):
    for M, K, p, splits in ((80, 784, 0.3, 1), (48, 1040, 0.0, 2)):
        down = DownProj(normal(R, K) / K**0.5, None, SEED if p else None, p)
        x = normal(M, K, dtype=dtype)
        with emulating(capability, splits):
            found = backend.project(x, [down])
        assert_as_exact_as_eager(found, "project", dtype, x, [down])


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "dtype", "R"), RANKS)
def test_grad_project_in_several_steps(capability, dtype, R):
    M, K = 344, 144
    for p in (0.0, 0.3):
        term = LowRankTerm(normal(M, R, dtype=dtype), normal(R, K), SEED if p else None, p)
        x = normal(M, K, dtype=dtype)
        with emulating(capability, 1 + (p > 0)):
            found = backend.grad_project(x, [term])
        assert_as_exact_as_eager(found, "grad_project", dtype, x, [term])


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "dtype", "R"), RANKS)
def test_row_norm_in_several_steps(capability, dtype, R):
    N, K = 144, 336
    W = normal(N, K, dtype=dtype) / K**0.5
    A, B = normal(R, K) / K**0.5, normal(N, R) / R**0.5 * 0.2
    for axis in ("out", "in"):
        with emulating(capability, 2):
            found = backend.row_norm(W, A, B, 1.0, axis)
        assert_as_exact_as_eager(found, "row_norm", dtype, W, A, B, 1.0, axis)


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "dtype", "R"), RANKS)
def test_low_rank_add_in_several_steps(capability, dtype, R):
    M, N = 136, 272
    y, h, B = (normal(*shape, dtype=dtype) for shape in ((M, N), (M, R), (N, R)))
    gain, found = torch.rand(N) + 0.5, y.clone()
    with emulating(capability):
        cuda_kernels.low_rank_add(found, h, B.float(), gain=gain)
    stock = ((y + h @ B.t()) * gain).to(dtype)
    truth = (y.double() + h.double() @ B.double().t()) * gain.double()
    within_twice([found], [stock], [truth], dtype)


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "dtype", "R"), RANKS)
def test_grad_output_in_several_steps(capability, dtype, R):
    M, N = 88, 584
    dy, kept, h = (normal(M, width, dtype=dtype) for width in (N, N, R))
    for want_v, beside, bias in ((True, None, False), (True, kept, True), (False, kept, True)):
        spec = UpProjGradSpec(normal(N, R) / R**0.5, h=h, want_v=want_v, want_B=True)
        with emulating(capability, 1 + want_v):
            found = backend.grad_output(dy, [spec], None, beside, bias)
        assert_as_exact_as_eager(found, "grad_output", dtype, dy, [spec], None, beside, bias)
