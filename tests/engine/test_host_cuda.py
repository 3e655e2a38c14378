"""The host path over the `cuda` backend: Python's launches, and on the emulator its bits."""

from unittest import mock

import pytest
import torch
from helpers import host_on_cuda
from helpers.cpp_compiler import needs_compiler
from helpers.cuda_compiler import needs_nvcc
from helpers.emulated_cuda import bits_of, emulating
from helpers.host_path import assert_same_bits
from helpers.layer_cases import every_form

from lorafast import testing
from lorafast.engine import cuda_forms
from lorafast.testing import Case

pytestmark = needs_compiler
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Sums in parts, several blocks of ranks, rows that are not aligned, and parts of few tokens.
SIZES = (
    (5, 8, 16, 1), (1, 40, 24, 4), (700, 264, 512, 16), (65, 130, 33, 24), (64, 72, 640, 140),
    (16, 72, 4104, 40),
)  # fmt: skip


def _without_addresses(form, grid, bits):
    """A launch that two runs have in common: of an address, whether it is one."""
    letters = cuda_forms.KERNELS[form.stem].parameters
    words = [
        bool(word) if letter == "p" else word for letter, word in zip(letters, bits, strict=True)
    ]
    return form, (*grid, 1, 1)[:3], words


def _launches(case):
    """The launches of a step by Python and by C++, none of which is made."""
    tensors, noted = testing.make(case), []

    def note(form, grid, bits):
        noted.append(_without_addresses(form, grid, bits))

    def loaded(form, device):
        def run(grid, *arguments):
            if all(grid):
                note(form, grid, bits_of(form, arguments))

        return run

    with emulating(90), mock.patch.object(cuda_forms, "loaded", loaded):
        testing.run(testing.ours, case, tensors)
        by_python = noted[:]
        noted.clear()
        with host_on_cuda.launching(note) as served:
            testing.run(testing.ours, case, tensors)
    assert served == [True]
    return by_python, noted


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("form", testing.FORMS, ids=lambda form: form.name)
def test_the_launches_are_those_of_python(form, sizes):
    turn = testing.FORMS.index(form) + SIZES.index(sizes)
    case = Case(
        form, *sizes, DTYPES[turn % 3], (0.2, 0.0)[turn % 2], bias=turn % 4 < 2,
        transposed=turn % 5 == 0,
    )  # fmt: skip
    case = case if case.works else Case(form, *sizes, DTYPES[turn % 3])
    by_python, by_host = _launches(case)
    assert by_python
    assert by_host == by_python


CASES = [case for _, _, case in every_form(*DTYPES)]


@needs_nvcc
@pytest.mark.parametrize(
    "case",
    [CASES[0], *(pytest.param(case, marks=pytest.mark.slow) for case in CASES[1:])],
    ids=str,
)
def test_the_bits_are_those_of_python(case):
    tensors = testing.make(case)
    with emulating(90):
        theirs = testing.run(testing.ours, case, tensors)
        with host_on_cuda.launching(host_on_cuda.on_emulator(90)) as served:
            ours = testing.run(testing.ours, case, tensors)
    assert served == [True]
    assert_same_bits(ours, theirs)
