"""The error rule: every output and gradient errs at most twice what the textbook eager chain errs against float64."""

import itertools
from dataclasses import replace

import pytest
import torch

from lorafast import testing
from lorafast.engine import reference
from lorafast.testing import FORMS, Case

LIMIT = 2
SHAPES = ((1, 130, 257, 1), (63, 130, 257, 12), (257, 65, 96, 8))
HALVES_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)
BY_NAME = {form.name: form for form in FORMS}


def cases(dtypes=HALVES_AND_SINGLE, shapes=SHAPES, forms=FORMS):
    grid = itertools.product(forms, shapes, dtypes, (0.0, 0.3), (False, True))
    every = (Case(form, *shape, dtype, p, bias) for form, shape, dtype, p, bias in grid)
    return [case for case in every if case.works]


def seeds(case):
    # A ratio of two random errors says little about a handful of elements, so small problems are drawn more often.
    return range(4 if case.M * case.R > 100 else 64)


def assert_within(ratios, case):
    worst = max(ratios, key=ratios.get)
    assert ratios[worst] <= LIMIT, (
        f"{case}: d_{worst} errs {ratios[worst]:.2f} times the eager chain; {ratios}"
    )


@pytest.mark.parametrize("case", cases(), ids=str)
def test_error_ratio(case):
    assert_within(testing.error_ratios(case, seeds=seeds(case)), case)


@pytest.mark.parametrize(
    "case", cases(dtypes=(torch.bfloat16, torch.float16), shapes=SHAPES[1:2]), ids=str
)
def test_error_ratio_with_factors_in_the_base_dtype(case):
    assert_within(testing.error_ratios(replace(case, adapter_dtype=case.dtype)), case)


@pytest.mark.parametrize("scaling", [0.02, 60.0])
@pytest.mark.parametrize(
    "case", [c for c in cases(shapes=((1, 130, 257, 8), (63, 130, 257, 12))) if not c.bias], ids=str
)
def test_error_ratio_where_one_part_dwarfs_the_other(case, scaling):
    assert_within(testing.error_ratios(replace(case, scaling=scaling), seeds=seeds(case)), case)


@pytest.mark.parametrize(
    "case", [replace(c, transposed=True) for c in cases(shapes=SHAPES[1:2])], ids=str
)
def test_error_ratio_with_a_transposed_weight(case):
    assert_within(testing.error_ratios(case), case)


@pytest.mark.parametrize("dtype", HALVES_AND_SINGLE, ids=str)
@pytest.mark.parametrize("form", ["lora", "lamda", "dora", "vera"])
def test_error_ratio_of_long_sums(form, dtype):
    case = Case(BY_NAME[form], 4096, 40, 24, 5, dtype)
    assert_within(testing.error_ratios(case, seeds=range(6)), case)


@pytest.mark.parametrize("case", cases(dtypes=(torch.float64,), shapes=((9, 14, 21, 3),)), ids=str)
def test_float64_is_the_truth(case):
    tensors = testing.make(case)
    got, truth = testing.run(testing.ours, case, tensors), testing.run(testing.chain, case, tensors)
    for name, value in truth.items():
        torch.testing.assert_close(
            got[name], value, rtol=1e-11, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("case", cases(dtypes=(torch.float64,), shapes=((9, 14, 21, 3),)), ids=str)
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
