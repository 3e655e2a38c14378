"""The C++ backend where sums are exact, to the bit, in every dtype; whatever is asked of dy."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from helpers.cpp_compiler import needs_compiler
from helpers.integer_problems import (
    CHECKS,
    DTYPES,
    LAYOUTS,
    NAN,
    assert_rounded_once,
    assert_up_proj_grads,
    cores,
    exact_gains,
    whole_numbers,
)

from lorafast.engine import half_products
from lorafast.engine.backends import cpu
from lorafast.engine.problem import DownProj, UpProj, UpProjGradSpec

pytestmark = [needs_compiler, pytest.mark.usefixtures("few_tokens_by_op")]
# M, N, K, R: ragged ends of every tile, one beyond every block, as few of everything as there can
# be; last, so many tokens that the sums over them are cut, and columns of which each task takes
# several blocks.
SHAPES = [
    (1, 1, 1, 1),
    (5, 17, 33, 3),
    (6, 255, 72, 4),
    (7, 130, 257, 12),
    (24, 31, 513, 17),
    (25, 512, 16, 2),
    (48, 1023, 8, 9),
    (49, 64, 1025, 33),
    (65, 1030, 130, 5),
    (128, 3, 256, 64),
    (129, 47, 65, 100),
    (3, 48, 20, 256),
    (900, 9, 1100, 6),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "M{}-N{}-K{}-R{}".format(*shape))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("primitive", CHECKS)
def test_whole_numbers_to_the_bit(primitive, dtype, shape):
    turn = SHAPES.index(shape) + list(DTYPES).index(dtype)
    factor = (torch.float32, torch.bfloat16, torch.float16)[turn % 3]
    CHECKS[primitive](cpu, DTYPES[dtype], factor, *shape, LAYOUTS[turn % len(LAYOUTS)])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("want_bias", [False, True])
def test_whatever_is_asked_of_dy_and_nothing_else(want_bias, kept, dtype):
    M, N, R = 13, 37, 5
    dy, h, B = (
        whole_numbers(*shape, DTYPES[dtype], "sliced", 7) for shape in ((M, N), (M, R), (N, R))
    )
    gain = exact_gains(N) if want_bias else None
    for wants, core in itertools.product(
        itertools.product((False, True), repeat=4), cores(R, torch.float32)
    ):
        back = UpProjGradSpec(B, 0.5, exact_gains(N), core, h, 2, *wants)
        back = back._replace(want_core=back.want_core and core is not None)
        sums = cpu.grad_output(dy, [back], gain, dy if kept else None, want_bias)
        assert_up_proj_grads(sums.adapters[0], dy, back, gain)
        assert (sums.d_bias is not None, sums.dot is not None) == (want_bias, kept)


def test_sums_without_an_adapter():
    dy = whole_numbers(13, 37, torch.bfloat16)
    sums = cpu.grad_output(dy, [], None, dy, want_bias=True)
    assert sums.adapters == []
    assert_rounded_once(sums.d_bias, dy.double().sum(0), torch.float32)
    assert_rounded_once(sums.dot, dy.double().square().sum(0), torch.float32)


def test_a_factor_in_float64_beside_one_that_is_not():
    """A problem tells the dtype of lora_A alone."""
    x, A, B, core = (
        whole_numbers(6, 20, torch.float32),
        whole_numbers(3, 20, torch.float32),
        whole_numbers(9, 3, torch.float64),
        whole_numbers(3, 3, torch.float64),
    )
    ((h, mixed),) = cpu.project(x, [DownProj(A, core)])
    assert_rounded_once(mixed, h.double() @ core.t())
    W = whole_numbers(9, 20, torch.float32)
    assert_rounded_once(
        cpu.linear(x, W, [UpProj(h, B)])[0], x.double() @ W.double().t() + h.double() @ B.t()
    )
    back = UpProjGradSpec(
        B, core=core, h=whole_numbers(20, 3, torch.float32), want_B=True, want_core=True
    )
    assert_up_proj_grads(cpu.grad_output(W.t(), [back]).adapters[0], W.t(), back, None)
    assert_rounded_once(cpu.row_norm(W, A, B), (W.double() + B @ A.double()).norm(dim=1))


# Every number of tokens of a tile and of tiles, one beyond a block; one row of W alone, ends of
# tiles and of tasks; and rows that are multiplied in more than one piece.
TOKENS = (1, 2, 3, 4, 5, 6, 7, 13, 16, 33, 70)
ROWS_OF_W = (1, 3, 4, 7, 64, 66, 130)
COLUMNS_OF_W = (1, 15, 33, 1000, 1027, 2100)


def exact_linear(x, W, h, B, scale, gain, bias):
    """y before it is rounded, and the sum before gain and bias, in float64."""
    total = x.double() @ W.double().t()
    if h is not None:
        low_rank = 2.0 * (h.double() @ B.double().t())
        total += low_rank if scale is None else low_rank * scale.double()
    y = total if gain is None else total * gain.double()
    return y if bias is None else y + bias.double(), total


@pytest.mark.parametrize("form", ["plain", "scaled", "gained", "without an adapter"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_y_by_one_kernel_to_the_bit(dtype, form):
    for turn, M in enumerate(TOKENS):
        for N, K in zip(ROWS_OF_W, COLUMNS_OF_W[turn % 2 :] * 2, strict=False):
            layout = ("contiguous", "sliced", "expanded")[(turn + N) % 3]
            R = (1, 5, 16, 40)[(turn + N) % 4]
            x, W = (whole_numbers(rows, K, DTYPES[dtype], layout, most=2) for rows in (M, N))
            h = whole_numbers(M, R, DTYPES[dtype], LAYOUTS[turn % 5], 3)
            B = whole_numbers(N, R, torch.float32, LAYOUTS[N % 5], 3)
            scale = exact_gains(N) if form == "scaled" else None
            gain = exact_gains(N) if form == "gained" else None
            bias = exact_gains(N) if turn % 2 else None
            up, inner = UpProj(h, B, 2.0, scale), torch.full((M, N), NAN, dtype=DTYPES[dtype])
            if form == "without an adapter":
                up = h = None
            y = cpu._one_kernel(x, W, up, gain, bias, inner)
            wanted, total = exact_linear(x, W, h, B, scale, gain, bias)
            if y is None:
                assert torch.equal(total, x.double() @ W.double().t())
                continue
            assert_rounded_once(y, wanted)
            assert_rounded_once(inner, total)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_of_a_token_do_not_depend_on_the_others(dtype):
    x, W, h = (torch.randn(shape).to(DTYPES[dtype]) for shape in ((16, 1500), (70, 1500), (16, 9)))
    up = UpProj(h, torch.randn(70, 9), 0.3)
    y, _ = cpu.linear(x, W, [up])
    for M in (2, 5, 11):
        fewer, _ = cpu.linear(x[:M], W, [up._replace(h_core=h[:M])])
        assert torch.equal(fewer, y[:M])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zero", ["h", "B", "scaling", "scale"])
def test_an_adapter_that_adds_nothing_changes_no_bit(zero, dtype):
    x, W, h = (torch.randn(shape).to(DTYPES[dtype]) for shape in ((5, 300), (70, 300), (5, 20)))
    bias = torch.randn(70).to(DTYPES[dtype])
    up = UpProj(h, torch.randn(70, 20), 0.0 if zero == "scaling" else 0.3, torch.ones(70))
    last = up._replace(out_scale=torch.eye(70)[69])
    if zero != "scaling":
        {"h": h, "B": up.B, "scale": up.out_scale}[zero].zero_()
    y, _ = cpu.linear(x, W, [up], None, bias)
    frozen = torch.nn.functional.linear(x, W, bias)
    if half_products.serves(5, W.t()):
        half_products.addmm(bias, x, W.t(), frozen)
    assert torch.equal(y, frozen)
    if zero == "scale":
        # One number that is not 0, the last.
        y, _ = cpu.linear(x, W, [last], None, bias)
        assert not torch.equal(y[:, 69], frozen[:, 69])


@pytest.mark.parametrize(
    ("isa", "dtype", "few"),
    [
        ("avx512bf16", torch.bfloat16, (1, 16)),
        ("avx512", torch.float16, (1, 16)),
        ("avx2", torch.float32, (1, 16)),
        ("avx2", torch.bfloat16, (2, 16)),
        ("scalar", torch.float32, ()),
    ],
)
def test_how_many_tokens_are_few(isa, dtype, few, monkeypatch):
    monkeypatch.setattr(cpu, "library", lambda: SimpleNamespace(ISA=isa))
    served = [M for M in range(40) if cpu.is_one_kernel(M, dtype)]
    assert served == (list(range(few[0], few[1] + 1)) if few else [])


@pytest.mark.parametrize("form", ["plain", "scaled", "gained"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("M", "R"), [(1, 1), (1, 16), (2, 17), (4, 5), (4, 40), (5, 16)])
def test_few_rows_in_fp32_to_the_bit(M, R, layout, form):
    """Beside a transposed W, a factor whose ranks lie side by side is not packed for them."""
    fp32 = torch.float32
    for N in (1, 3, 4, 17, 255, 256, 261, 530):
        K = 8
        x, W = whole_numbers(M, K, fp32, layout, 3), whole_numbers(K, N, fp32, most=3).t()
        h, B = whole_numbers(M, R, fp32, layout, 3), whole_numbers(N, R, fp32, most=3)
        scale = exact_gains(N) if form == "scaled" else None
        gain = exact_gains(N) if form == "gained" else None
        bias = exact_gains(N) if form == "gained" else None
        y, z = cpu.linear(x, W, [UpProj(h, B, 2.0, scale)], gain, bias, gain is not None)
        wanted, total = exact_linear(x, W, h, B, scale, gain, bias)
        assert torch.equal(y.double(), wanted)
        assert z is None or torch.equal(z.double(), total)
