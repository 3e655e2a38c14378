"""Grouped primitives as compiled for sm_80 and sm_90, in bf16 and fp16, on the emulator."""

import pytest
import torch
from emulator.process import in_emulator
from helpers.emulated_device import emulated
from helpers.grouped_rule import Errors, groups_of
from helpers.triton_interpreter import SEED

from lorafast import testing
from lorafast.engine import philox
from lorafast.engine.grouped import triton as backend
from lorafast.engine.problem import BaseTerm, DownProj, LowRankTerm, UpProj, UpProjGradSpec

BF16, FP16 = torch.bfloat16, torch.float16
TARGETS = [(90, BF16), (80, BF16), (90, FP16), (80, FP16)]
# Rows of each expert: none, one, several blocks of rows, several blocks of a sum.
COUNTS = (0, 1, 330, 19, 0)
# K, N, R and how far apart the rows of activations are beyond their length.
SHAPES = [(70, 40, 17, 3), (144, 136, 16, 0), (33, 65, 3, 1), (72, 136, 100, 0)]


def slow_but_first(cases):
    """Return parameters of which only the first case is not slow."""
    return [cases[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in cases[1:])]


def rows(S, width, beyond, dtype):
    """Return normal numbers [S,width], whose rows are apart."""
    return torch.randn(S, width + beyond).to(dtype)[:, :width]


CASES = [(*target, *shape, i % 2 == 0) for i, shape in enumerate(SHAPES) for target in TARGETS]


@pytest.mark.parametrize(
    ("capability", "dtype", "K", "N", "R", "beyond", "drops"),
    slow_but_first([*CASES, *((*case[:-1], not case[-1]) for case in CASES[::3])]),
)
@in_emulator
def test_every_primitive(capability, dtype, K, N, R, beyond, drops):
    groups, E, S = groups_of(COUNTS), len(COUNTS), sum(COUNTS)
    seed, p = (SEED, 0.3) if drops else (None, 0.0)
    x, dy, kept = (rows(S, width, beyond, dtype) for width in (K, N, N))
    weight = torch.randn(E, N, K).to(dtype) / K**0.5
    A, B = torch.randn(E, R, K) / K**0.5, torch.randn(E, N, R) / R**0.5
    # A full core where torch multiplies none of what is tested.
    core = torch.randn(E, R, R) / R**0.5 if drops else torch.randn(E, R)
    gain, scale, bias = (torch.randn(E, N) for _ in range(3))
    h = torch.randn(S, R).to(dtype)

    def check(primitive, *operands):
        errors = Errors(dtype)
        with emulated(capability):
            found = getattr(backend, primitive)(groups, *operands)
        errors.add_found(primitive, found, primitive, groups, *operands)
        errors.check()

    check("project", x, [DownProj(A, core, seed, p)])
    ups = [UpProj(h, B, 1.5, scale)]
    check("linear", x, weight, ups, gain if drops else None, bias, drops)
    # Beside fp16 eager's u is fp32, and so is what a core makes of it: the tests of layers have
    # that, against the chain of stock ops.
    own_core = None if dtype == FP16 else core
    spec = UpProjGradSpec(
        B, 1.5, None if drops else scale, own_core, h,
        want_v=True, want_B=True, want_core=drops and own_core is not None,
        want_out_scale=not drops,
    )  # fmt: skip
    check("grad_output", dy, [spec], gain, kept if drops else None, True)
    terms = [LowRankTerm(h, A, seed, p)]
    check("grad_input", [BaseTerm(dy, weight, gain)], terms)
    check("grad_project", x, terms)


LAYERS = [
    (90 - 10 * (i % 2), form.name, (BF16, BF16, FP16)[i % 3], (0.3, 0.0)[i // 2 % 2])
    for i, form in enumerate(form for form in testing.FORMS if form.axis == "out")
]


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "form", "dtype", "p"), LAYERS)
@in_emulator
def test_layers_of_experts_obey_the_rule(capability, form, dtype, p):
    (own,) = (one for one in testing.FORMS if one.name == form)
    one = testing.Case(own, 0, 40, 72, 8, dtype, p)
    one = one if one.works else testing.Case(own, 0, 40, 72, 8, dtype)
    case = testing.ExpertsCase(one, (5, 0, 67, 1))
    made = [testing.make_experts(case, seed) for seed in range(2)]
    yardstick = testing.Yardstick(case, made, testing.chain_experts)
    with emulated(capability):
        ratios = yardstick.ratios(lambda t: testing.run(testing.ours_experts, case, t))
    assert max(ratios.values()) <= 2, ratios


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "dtype"), TARGETS)
@in_emulator
def test_dropped_elements_are_those_of_the_rows_given(capability, dtype):
    """Every kernel that drops is shown the mask itself: products with ones and unit vectors."""
    groups, p, K = groups_of((5, 0, 80, 1)), 0.25, 130
    for rows in (groups.rows, None):
        own = groups._replace(rows=rows)
        S, E = 86, 4
        kept = own.keep_mask(SEED, p, slice(0, S), K).float() * torch.tensor(philox.scale(p))
        x, columns = torch.ones(S, K, dtype=dtype), torch.arange(0, K, 3)
        A = torch.nn.functional.one_hot(columns, K).float()
        one_row = torch.eye(S).to(dtype)
        dx = torch.zeros(S, 8, dtype=dtype)
        with emulated(capability):
            ((h, _),) = backend.project(own, x, [DownProj(A, None, SEED, p)])
            (dA,) = backend.grad_project(
                own, x, [LowRankTerm(one_row, torch.empty(E, S, K), SEED, p)]
            )
            out = backend.grad_input(
                own, [BaseTerm(dx, torch.zeros(E, 8, K, dtype=dtype))],
                [LowRankTerm(x[:, :1], torch.ones(1, K), SEED, p)],
            )  # fmt: skip
            dropped = backend.drop(own, x, SEED, p)
        for found, expected in (
            (h, kept[:, columns]), (dA.sum(0), kept), (out, kept), (dropped, kept),
        ):  # fmt: skip
            torch.testing.assert_close(found, expected.to(found.dtype), rtol=0, atol=0)
