"""decode, the output of a few tokens in one launch, on the emulator and as it is chosen."""

import contextlib
import itertools
from unittest import mock

import pytest
import torch
from helpers.against_eager import assert_as_exact_as_eager
from helpers.cuda_compiler import skip_without_nvcc
from helpers.emulated_cuda import emulating
from helpers.integer_problems import HALF, assert_rounded_once, exact_gains, whole_numbers

from lorafast.engine import cuda_decode, cuda_forms
from lorafast.engine.backends import cuda as backend
from lorafast.engine.problem import UpProj

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
HALVES = [(90, BF16), (80, BF16), (90, FP16), (80, FP16)]
# M, N, K, R and the splits of the sum: one tile of tokens and two, ragged rows of W, steps that are
# not whole, and ranks that take a warp or four.
SIZES = [
    (1, 40, 72, 4, 1), (7, 33, 520, 17, 1), (8, 64, 1096, 12, 1), (16, 130, 648, 64, 1),
    (9, 1, 8, 1, 1), (1, 72, 1032, 48, 3), (16, 33, 2088, 16, 2), (2, 256, 16, 5, 1),
]  # fmt: skip
CASES = [
    (*target, *sizes)
    for i, (target, sizes) in enumerate(itertools.product(HALVES, SIZES))
    if target[1] == BF16 or i % 3 == 0
]
QUICK = {(90, BF16, *SIZES[1]), (80, BF16, *SIZES[5])}


def slow_but(quick, cases):
    """Return parameters of which only some cases are not slow."""
    return [pytest.param(*case, marks=[pytest.mark.slow] * (case not in quick)) for case in cases]


def within_nan(rows, columns, dtype, most):
    """Return whole numbers with aligned rows, between rows and columns of NaN."""
    around = torch.full((rows + 2, columns + 16), torch.nan, dtype=dtype)
    view = around[1 : 1 + rows, 8 : 8 + columns]
    view.copy_(whole_numbers(rows, columns, dtype, most=most))
    return view


@contextlib.contextmanager
def noting():
    """Return a context that gives the stems of the launches that are made in it."""
    stems, loaded = [], cuda_forms.loaded

    def note(form, device):
        stems.append(form.stem)
        return loaded(form, device)

    with mock.patch.object(cuda_forms, "loaded", note):
        yield stems


@pytest.mark.parametrize(("capability", "dtype", "M", "N", "K", "R", "splits"),
                         slow_but(QUICK, CASES))  # fmt: skip
def test_whole_numbers_are_exact(capability, dtype, M, N, K, R, splits):
    """y and z with gain, bias, both and neither; factors in each dtype and by columns, too."""
    skip_without_nvcc()
    x, W, h = (within_nan(*size, dtype, 1) for size in ((M, K), (N, K), (M, R)))
    B = whole_numbers(N, R, FP32, "sliced"), whole_numbers(N, R, dtype, "transposed")
    out_scale, gain, bias = exact_gains(N), exact_gains(N), whole_numbers(1, N, dtype)[0]
    launches = ["decode", "decode_finish"][: 1 + (splits > 1)]
    for up, own_gain, own_bias in (
        (UpProj(h, B[0], HALF, out_scale), gain, bias),
        (UpProj(h, B[1], torch.tensor(2.5), out_scale.to(dtype)), None, bias.float()),
        (UpProj(h, B[0], -2.0), gain.to(dtype), None),
    ):
        with emulating(capability, splits), noting() as made:
            y, z = backend.linear(x[None], W, [up], own_gain, own_bias, True)
            again, none = backend.linear(x[None], W, [up], own_gain, own_bias)
        assert made == 2 * launches
        assert none is None
        assert torch.equal(y, again)
        factor = up.B.double() * float(up.scaling)
        factor = factor if up.out_scale is None else factor * up.out_scale.double()[:, None]
        exact = x.double() @ W.double().t() + h.double() @ factor.t()
        assert (z is None) == (own_gain is None)
        if z is not None:
            assert_rounded_once(z, exact)
            exact = exact * own_gain.double()
        exact = exact if own_bias is None else exact + own_bias.double()
        assert_rounded_once(y, exact[None])


@pytest.mark.parametrize(
    ("capability", "dtype", "M", "R", "splits"),
    slow_but(
        {(90, BF16, 5, 16, 1)},
        [(90, BF16, 5, 16, 1), (80, BF16, 16, 64, 2), (90, FP16, 16, 8, 1), (80, FP16, 1, 32, 2)],
    ),
)
def test_normal_numbers_in_several_steps(capability, dtype, M, R, splits):
    skip_without_nvcc()
    N, K = 72, 2184
    x, W = torch.randn(M, K).to(dtype), (torch.randn(N, K) / K**0.5).to(dtype)
    up = UpProj(torch.randn(M, R).to(dtype), torch.randn(N, R) / R**0.5)
    operands = (x, W, [up], torch.rand(N) + 0.5, torch.randn(N), True)
    with emulating(capability, splits):
        found = backend.linear(*operands)
    assert_as_exact_as_eager(found, "linear", dtype, *operands)


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_several_adapters_are_one_launch(dtype):
    skip_without_nvcc()
    x, W = whole_numbers(3, 64, dtype, most=1), whole_numbers(40, 64, dtype, most=1)
    ups = [
        UpProj(whole_numbers(3, R, dtype, most=3), whole_numbers(40, R, FP32, most=3), s)
        for R, s in ((4, 2.0), (7, HALF))
    ]
    with emulating(90), noting() as made:
        y, _ = backend.linear(x, W, ups)
    assert made == ["decode"]
    low = sum(up.scaling * up.h_core.double() @ up.B.double().t() for up in ups)
    assert_rounded_once(y, x.double() @ W.double().t() + low)


def served(M=4, N=40, K=64, R=8, dtype=BF16, weight=None, x=None):
    """True if decode serves a call."""
    x = torch.zeros(M, K, dtype=dtype) if x is None else x
    weight = torch.zeros(N, K, dtype=dtype) if weight is None else weight
    up = UpProj(torch.zeros(M, R, dtype=dtype), torch.zeros(N, R))
    return cuda_decode.serves(x, weight, up)


def test_what_is_served():
    """Up to 16 tokens and 64 ranks in half precision, from rows that are dense and aligned."""
    for sizes in ({}, {"M": 1}, {"M": 16}, {"N": 1}, {"K": 8}, {"R": 64}, {"dtype": FP16}):
        assert served(**sizes), sizes
    for sizes in ({"M": 0}, {"M": 17}, {"N": 0}, {"K": 0}, {"K": 63}, {"R": 65}, {"dtype": FP32}):
        assert not served(**sizes), sizes
    around = torch.zeros(64, 80, dtype=BF16)
    assert served(weight=around[:40, 8:72])
    assert not served(weight=around[:40, 4:68])
    assert not served(weight=around[:, :40].t())
    assert not served(x=around[:4, 4:68])
    assert not served(x=around[:64, :4].t())


@pytest.mark.parametrize("M", [0, 17])
def test_other_numbers_of_tokens_take_the_product_of_torch(M):
    skip_without_nvcc()
    x, W = whole_numbers(M, 32, BF16, most=1), whole_numbers(24, 32, BF16, most=1)
    up = UpProj(whole_numbers(M, 4, BF16, most=1), whole_numbers(24, 4, FP32, most=1))
    with emulating(90), noting() as made:
        y, _ = backend.linear(x, W, [up])
    assert "decode" not in made
    exact = x.double() @ W.double().t() + up.h_core.double() @ up.B.double().t()
    assert_rounded_once(y, exact)
