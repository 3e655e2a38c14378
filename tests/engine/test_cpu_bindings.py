"""The functions of the compiled module: what they take from Python, and how they refuse."""

import pytest
import torch
from helpers.cpp_compiler import needs_compiler

from lorafast.engine.backends import cpu

pytestmark = needs_compiler


def scale_arguments():
    """The arguments of scale, by name: gain⊙x of ones, 2 rows of 3, a gain of 2 for each column."""
    x, gain, out = torch.ones(2, 3), torch.full((3,), 2.0), torch.zeros(2, 3)
    named = {
        "type": 0, "x": x.data_ptr(), "rows": 2, "columns": 3, "stride": 3,
        "gain": gain.data_ptr(), "by_row": False, "out": out.data_ptr(), "threads": 1,
    }  # fmt: skip
    return named, (x, gain, out)


def test_numbers_and_addresses_arrive():
    named, (_, gain, out) = scale_arguments()
    assert cpu.library().scale(*named.values()) is None
    assert out.tolist() == [[2.0] * 3] * 2
    gain.copy_(torch.tensor([3.0, 4.0, 5.0]))
    named["by_row"] = True
    cpu.library().scale(*named.values())
    assert out.tolist() == [[3.0] * 3, [4.0] * 3]
    assert cpu.library().largest_workspace() >= 0


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"rows": 2.0}, TypeError),
        ({"x": None}, TypeError),
        ({"x": -1}, OverflowError),
        ({"x": 2**64}, OverflowError),
        ({"columns": 2**63}, OverflowError),
        ({"threads": 2**31}, OverflowError),
        ({"threads": -(2**31) - 1}, OverflowError),
    ],
)
def test_what_does_not_fit_is_an_error_and_nothing_is_written(changes, error):
    named, (_, _, out) = scale_arguments()
    with pytest.raises(error):
        cpu.library().scale(*(named | changes).values())
    assert not out.any()


def test_the_number_of_arguments_is_checked():
    named, _ = scale_arguments()
    for given in ((), tuple(named.values())[:-1], (*named.values(), 1)):
        with pytest.raises(TypeError, match=f"takes 9 arguments, not {len(given)}"):
            cpu.library().scale(*given)
    with pytest.raises(TypeError):
        cpu.library().scale(**named)
