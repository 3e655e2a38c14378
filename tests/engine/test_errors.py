"""The error rule: no output or gradient errs more than twice what the eager chain errs."""

import itertools
from dataclasses import replace

import pytest
import torch
from helpers.rotations import DROPOUT_AND_BIAS, rotating, thinned

from lorafast import testing
from lorafast.engine import reference
from lorafast.testing import FORMS, Case

LIMIT = 2
SHAPES = ((1, 130, 257, 1), (63, 130, 257, 12), (257, 65, 96, 8))
MIDDLE = SHAPES[1]
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES)
BY_NAME = {form.name: form for form in FORMS}


def cases(dtypes=DTYPES, shapes=(MIDDLE,), count=1, step=1):
    """Every form in every dtype, each with `count` combinations of shape, dropout and bias.

    A bias and a dropout meet every form, every dtype and every shape; not all of them at once.
    """
    grid = rotating(itertools.product(FORMS, dtypes), DROPOUT_AND_BIAS, count, step)
    for ((form, dtype), (p, bias)), shape in zip(grid, itertools.cycle(shapes), strict=False):
        yield Case(form, *shape, dtype, p, bias)


def seeds(case):
    # A ratio of two random errors says little about a handful of elements, so small problems are
    # drawn more often.
    return range(4 if case.M * case.R > 100 else 64)


def assert_within(ratios, case):
    worst = max(ratios, key=ratios.get)
    assert ratios[worst] <= LIMIT, (
        f"{case}: d_{worst} errs {ratios[worst]:.2f} times the eager chain; {ratios}"
    )


@pytest.mark.parametrize(
    "case", thinned(((case,) for case in cases(shapes=SHAPES, count=3)), 2), ids=str
)
def test_error_ratio(case):
    assert case.works
    assert_within(testing.error_ratios(case, seeds=seeds(case)), case)


@pytest.mark.parametrize("case", list(cases(HALVES, count=2, step=2)), ids=str)
def test_error_ratio_with_factors_in_the_base_dtype(case):
    assert_within(testing.error_ratios(replace(case, adapter_dtype=case.dtype)), case)


def dwarfed():
    """A small and a large scaling for every form and dtype; shapes and dropout take turns."""
    # In each pair of (scaling, shape, dropout) every value occurs; four pairs have all
    # combinations, and the firsts of the four every two values.
    few, many = (1, 130, 257, 8), MIDDLE
    pairs = (
        ((0.02, few, 0.0), (60.0, many, 0.3)),
        ((0.02, many, 0.3), (60.0, few, 0.0)),
        ((60.0, many, 0.0), (0.02, few, 0.3)),
        ((60.0, few, 0.3), (0.02, many, 0.0)),
    )
    for (form, dtype), pair in rotating(itertools.product(FORMS, DTYPES), pairs):
        for scaling, shape, p in pair:
            yield Case(form, *shape, dtype, p, False, scaling)


@pytest.mark.parametrize(
    "case",
    thinned(((case,) for case in dwarfed()), 2),
    ids=lambda case: f"{case}-s{case.scaling}",
)
def test_error_ratio_where_one_part_dwarfs_the_other(case):
    assert_within(testing.error_ratios(case, seeds=seeds(case)), case)


@pytest.mark.parametrize("case", [replace(case, transposed=True) for case in cases()], ids=str)
def test_error_ratio_with_a_transposed_weight(case):
    assert_within(testing.error_ratios(case), case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["lora", "lamda", "dora", "vera"])
def test_error_ratio_of_long_sums(form, dtype):
    case = Case(BY_NAME[form], 4096, 40, 24, 5, dtype)
    assert_within(testing.error_ratios(case, seeds=range(6)), case)


@pytest.mark.parametrize("grad_scale", [2.0**-14, 2.0**-20], ids=str)
@pytest.mark.parametrize("case", list(cases(HALVES)), ids=str)
def test_error_ratio_of_small_gradients(case, grad_scale):
    """As a mean over thousands of tokens gives: fp16 cannot hold s·dy·B, whatever dy is."""
    case = replace(case, grad_scale=grad_scale)
    ratios = testing.error_ratios(case)
    if case.form.axis == "in":
        # The sum of x times a gradient [M,K], which has dy's dtype, as in any layer of torch.
        del ratios["magnitude"]
    assert_within(ratios, case)


IN_FLOAT64 = list(cases((torch.float64,), ((9, 14, 21, 3),), count=2, step=2))


@pytest.mark.parametrize("case", IN_FLOAT64, ids=str)
def test_float64_is_the_truth(case):
    tensors = testing.make(case)
    got, truth = testing.run(testing.ours, case, tensors), testing.run(testing.chain, case, tensors)
    for name, value in truth.items():
        torch.testing.assert_close(
            got[name], value, rtol=1e-11, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("case", IN_FLOAT64, ids=str)
def test_reference_in_float64(case):
    def plain(case, t):
        f = case.form
        norm = None
        if not f.detach_norm:
            norm = reference.row_norm(
                t["weight"],
                t["lora_A"],
                t["lora_B"],
                t["core"],
                t["out_scale"],
                case.scaling,
                f.axis,
            )
        names = (
            "x",
            "weight",
            "bias",
            "lora_A",
            "lora_B",
            "core",
            "magnitude",
            "out_scale",
            "lora_bias",
            "seed",
        )
        given = {name: t[name] for name in names}
        return reference.linear(
            **given,
            norm=norm,
            axis=f.axis,
            scaling=case.scaling,
            dropout=case.dropout,
            dropout_on=f.dropout_on,
        )

    tensors = testing.make(case)
    got, truth = testing.run(plain, case, tensors), testing.run(testing.chain, case, tensors)
    for name, value in truth.items():
        torch.testing.assert_close(
            got[name], value, rtol=1e-11, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_a_planted_error_is_seen():
    case = Case(BY_NAME["lora"], 63, 130, 257, 12, torch.float32)

    def wrong(case, t):
        return testing.ours(case, t) * (1 + 1e-5)

    assert testing.error_ratios(case, wrong)["y"] > LIMIT


def test_nan_from_the_code_under_test_is_infinite_error():
    assert testing.ratio(float("nan"), 1.0, 1.0, 1e-8) == float("inf")
