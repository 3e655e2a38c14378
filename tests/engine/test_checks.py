"""Bad input: one error, which names the argument and the shapes, and changes nothing."""

import random

import pytest
import torch

import lorafast
from lorafast.engine import checks
from lorafast.engine.problem import CallOptions, LayerTensors

N, K, R = 6, 5, 2
GOOD = {
    "x": torch.randn(3, K),
    "weight": torch.randn(N, K),
    "bias": torch.randn(N),
    "lora_A": torch.randn(R, K),
    "lora_B": torch.randn(N, R),
    "core": torch.randn(R, R),
    "magnitude": torch.rand(N) + 1,
    "norm": torch.rand(N) + 1,
    "out_scale": torch.randn(N),
    "lora_bias": torch.randn(N),
    "seed": torch.tensor([3]),
}

WRONG = {
    "x, last dim": (
        {"x": torch.randn(3, 4)},
        ValueError,
        r"x \(3, 4\) must end in K=5 for weight \(6, 5\)",
    ),
    "x, no dim": ({"x": torch.tensor(1.0)}, ValueError, r"x \(\) must end in K=5"),
    "x, integers": (
        {"x": torch.ones(3, K, dtype=torch.int64)},
        TypeError,
        r"x \(3, 5\) is torch.int64",
    ),
    "x, complex": (
        {"x": torch.ones(3, K, dtype=torch.complex64)},
        TypeError,
        r"x \(3, 5\) is torch.complex64",
    ),
    "x, no tensor": ({"x": [1.0]}, TypeError, "x must be a tensor, not list"),
    "weight, dims": ({"weight": torch.randn(N)}, ValueError, r"weight \(6,\) must be \[N, K\]"),
    "weight, quantised": (
        {"weight": torch.ones(N, K, dtype=torch.uint8)},
        TypeError,
        r"weight \(6, 5\) is torch.uint8",
    ),
    "weight, dtype": (
        {"weight": torch.randn(N, K, dtype=torch.float64)},
        TypeError,
        r"weight \(6, 5\) is torch.float64",
    ),
    "weight, device": (
        {"weight": torch.empty(N, K, device="meta")},
        ValueError,
        r"weight \(6, 5\) is on meta, x \(3, 5\)",
    ),
    "bias": (
        {"bias": torch.randn(K)},
        ValueError,
        r"bias \(5,\) must be \(6,\) for weight \(6, 5\)",
    ),
    "lora_A, K": (
        {"lora_A": torch.randn(R, N)},
        ValueError,
        r"lora_A \(2, 6\) must be \[R>0, K=5\] for weight \(6, 5\)",
    ),
    "lora_A, rank 0": ({"lora_A": torch.randn(0, K)}, ValueError, r"lora_A \(0, 5\)"),
    "lora_A, integers": (
        {"lora_A": torch.ones(R, K, dtype=torch.int8)},
        TypeError,
        r"lora_A \(2, 5\) is torch.int8",
    ),
    "lora_A, none": ({"lora_A": None}, TypeError, "lora_A is None"),
    "lora_B": (
        {"lora_B": torch.randn(N, 3)},
        ValueError,
        r"lora_B \(6, 3\) must be \(6, 2\) for weight \(6, 5\) and rank 2",
    ),
    "lora_B, device": (
        {"lora_B": torch.empty(N, R, device="meta")},
        ValueError,
        r"lora_B \(6, 2\) is on meta",
    ),
    "core": ({"core": torch.randn(3)}, ValueError, r"core \(3,\) must be \(2, 2\) or \(2,\)"),
    "magnitude": ({"magnitude": torch.rand(K)}, ValueError, r"magnitude \(5,\) must be \(6,\)"),
    "magnitude, axis": (
        {"axis": "in", "norm": None},
        ValueError,
        r"magnitude \(6,\) must be \(5,\)",
    ),
    "norm": ({"norm": torch.rand(K)}, ValueError, r"norm \(5,\) must be \(6,\)"),
    "norm alone": ({"magnitude": None}, ValueError, r"norm \(6,\) is given without magnitude"),
    "out_scale": ({"out_scale": torch.rand(K)}, ValueError, r"out_scale \(5,\) must be \(6,\)"),
    "lora_bias": ({"lora_bias": torch.rand(R)}, ValueError, r"lora_bias \(2,\) must be \(6,\)"),
    "seed, dtype": (
        {"seed": torch.tensor([3.0])},
        TypeError,
        r"seed \(1,\) torch.float32 must be \(1,\) int64",
    ),
    "seed, shape": ({"seed": torch.tensor(3)}, TypeError, r"seed \(\) torch.int64 must be"),
    "seed, number": (
        {"seed": 3},
        TypeError,
        r"seed must be an int64 tensor of shape \(1,\), not 3",
    ),
    "scaling, word": (
        {"scaling": "2"},
        TypeError,
        "scaling must be a number or a tensor of one element, not '2'",
    ),
    "scaling, none": ({"scaling": None}, TypeError, "scaling must be a number"),
    "dropout, word": ({"dropout": "0.1"}, TypeError, "dropout '0.1' must be a number"),
    "dropout, none": ({"dropout": None}, TypeError, "dropout None must be a number"),
    "frozen_columns, half": (
        {"frozen_columns": 1.5},
        ValueError,
        "frozen_columns 1.5 must be an integer",
    ),
    "keep, axis": (
        {"keep": "inner", "axis": "in", "magnitude": None, "norm": None},
        ValueError,
        "belongs to axis='out'",
    ),
    "dropout": ({"dropout": 1.0}, ValueError, r"dropout 1.0 must be in \[0, 1\)"),
    "dropout, negative": ({"dropout": -0.5}, ValueError, "dropout -0.5"),
    "axis": ({"axis": 0}, ValueError, "axis=0 must be one of 'out', 'in'"),
    "dropout_on": ({"dropout_on": "x"}, ValueError, "dropout_on='x'"),
    "keep": ({"keep": "y"}, ValueError, "keep='y'"),
    "keep, both": (
        {"keep": "output", "dropout_on": "both", "dropout": 0.1},
        ValueError,
        "keep='inner'",
    ),
    "frozen_columns": (
        {"frozen_columns": 3},
        ValueError,
        r"frozen_columns 3 must .* between 0 and R=2, lora_B \(6, 2\)",
    ),
    "scaling, nan": ({"scaling": float("nan")}, ValueError, "scaling nan must be finite"),
    "scaling, device": (
        {"scaling": torch.ones((), device="meta")},
        ValueError,
        r"scaling \(\) is on meta, x \(3, 5\)",
    ),
    "scaling, complex": (
        {"scaling": torch.ones((), dtype=torch.complex64)},
        TypeError,
        r"scaling \(\) is torch.complex64",
    ),
    "scaling": ({"scaling": torch.ones(2)}, ValueError, r"scaling \(2,\)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong(name):
    changes, error, message = WRONG[name]
    state = torch.get_rng_state()
    with pytest.raises(error, match=message):
        lorafast.linear(**(GOOD | changes))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_norm_checks_its_factors_too():
    with pytest.raises(ValueError, match=r"lora_B \(6, 3\) must be \(6, 2\) for weight \(6, 5\)"):
        lorafast.functional.row_norm(GOOD["weight"], GOOD["lora_A"], torch.randn(N, 3))
    with pytest.raises(ValueError, match="axis='rows'"):
        lorafast.functional.row_norm(GOOD["weight"], GOOD["lora_A"], GOOD["lora_B"], axis="rows")


def test_the_norm_takes_no_weight_for_one_it_has_seen():
    A, B = GOOD["lora_A"], GOOD["lora_B"]
    for axis in ("out", "in"):
        for _ in range(2):
            lorafast.functional.row_norm(GOOD["weight"], A, B, axis=axis)
        for weight in (torch.randn(N + 1, K), torch.randn(N - 1, K), torch.randn(500, K)):
            with pytest.raises(ValueError, match=r"lora_B \(6, 2\) must be"):
                lorafast.functional.row_norm(weight, A, B, axis=axis)
        for weight in (torch.randn(K), torch.randn(2, N, K)):
            with pytest.raises(ValueError, match=r"weight \(.*\) must be \[N, K\]"):
                lorafast.functional.row_norm(weight, A, B, axis=axis)


def test_right():
    assert lorafast.linear(**GOOD).shape == (3, N)
    assert lorafast.linear(**GOOD, dropout=0.5, frozen_columns=2, keep="recompute").shape == (3, N)


def test_in_the_layer_too():
    with pytest.raises(ValueError, match=r"x \(2, 4\) must end in K=5"):
        lorafast.Linear(K, N)(torch.randn(2, 4))


SHAPES = [(), (1,), (R,), (N,), (K,), (R, R), (R, K), (N, R), (N, K), (0, K), (N, 0), (3, K)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.complex64]
SHARES = [0.0, 0.3, 0.99, 1e-9, 1 - 1e-9, 1.0, 1e400, -1e400, 1e400 - 1e400]
NUMBERS = [
    *SHARES,
    0,
    1,
    2,
    -1,
    True,
    False,
    "1",
    None,
    torch.zeros(()),
    torch.zeros(3),
    0j,
    2**70,
    [0],
]
WORDS = [*checks.AXES, *checks.DROPOUT_ON, *checks.KEEPS, "", 0, None, ["out"]]


def _values():
    """For every argument, some that are right with GOOD and some that are not."""
    shapes, dtypes = [*SHAPES, (2, 3, K)], [torch.float32, *DTYPES]
    tensors = [torch.zeros(shape, dtype=dtype) for shape in shapes for dtype in dtypes]
    tensors += [None, 2.0, [1.0], torch.empty(N, device="meta"), torch.randn(K, N).t()]
    tensors.append(torch.nn.Parameter(torch.randn(N)))
    values = dict.fromkeys(("x", *LayerTensors._fields[:-1]), tensors)
    values |= dict.fromkeys(("axis", "dropout_on", "keep"), WORDS)
    return values | {
        "scaling": [*NUMBERS, torch.ones(()), torch.ones(2)],
        "dropout": NUMBERS,
        "frozen_columns": [*NUMBERS, N],
    }


@pytest.mark.parametrize("autocast", [False, True])
def test_the_quick_check_accepts_what_the_full_check_accepts_and_no_more(autocast):
    def verdict(check):
        parts = LayerTensors(*(given[name] for name in LayerTensors._fields[:-1]))
        numbers = (
            given[name]
            for name in ("scaling", "dropout", "axis", "dropout_on", "keep", "frozen_columns")
        )
        try:
            return check(given["x"], parts, CallOptions(*numbers))
        except Exception as error:
            return type(error), str(error)

    choose, values, accepted = random.Random(0), _values(), 0
    usual = {
        "scaling": 1.0,
        "dropout": 0.0,
        "axis": "out",
        "dropout_on": "adapter",
        "keep": "auto",
        "frozen_columns": 0,
    }
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for name in (*values, *(None for _ in range(4000))):
            for value in values[name] if name else (None,):
                given = dict.fromkeys(LayerTensors._fields[:-1]) | usual | GOOD
                for optional in (
                    "bias",
                    "core",
                    "magnitude",
                    "norm",
                    "out_scale",
                    "lora_bias",
                    "seed",
                ):
                    given[optional] = choose.choice((None, GOOD[optional]))
                changed = (
                    {name: value}
                    if name
                    else {
                        one: choose.choice(values[one]) for one in choose.sample(sorted(values), 2)
                    }
                )
                given |= changed
                full = verdict(checks._check_call)
                assert verdict(checks.call) == full, changed
                accepted += isinstance(full, torch.dtype)
    assert accepted > 100
