"""Gates on the machine code of the CUDA kernels, of 8192 tokens through 4096 → 4096 in bf16.

Instructions are counted, and nothing is timed. See tests/kernels/test_sass_loops.py.
"""

import pytest
from helpers import cuda_figures, sass_loops

from lorafast.engine.cuda_forms import ALIGNED, DROPS
from lorafast.engine.kernels import loop_counts

MULTIPROCESSORS = 132
LEAST_IN_FLIGHT = 24 * 1024
# By call: the form's stem and flags, and the most instructions for an element.
CALLS = {
    "project": ("project", ALIGNED + 4, 3),
    "project, dropout": ("project", DROPS + ALIGNED + 4, 10),
    "project, a factor as it is": ("project", ALIGNED + 4 + 8, 3),
    "project, dropout and a factor as it is": ("project", DROPS + ALIGNED + 4 + 8, 10),
    "decode": ("decode", 0, 2),
    "decode, parts": ("decode", 4, 2),
    "grad_project": ("grad_project", ALIGNED, 3),
    "grad_project, dropout": ("grad_project", DROPS + ALIGNED, 10),
    "grad_output": ("grad_output", ALIGNED + 1 + 4, 6),
    "grad_output, bias": ("grad_output", ALIGNED + 1 + 4 + 8, 6),
    "grad_output, kept": ("grad_output", ALIGNED + 1 + 4 + 24, 7),
    "grad_output, frozen A": ("grad_output", ALIGNED + 4, 3),
    "low_rank_add": ("low_rank_add", ALIGNED + 4, 6),
    "low_rank_add, gain": ("low_rank_add", ALIGNED + 4 + 8, 9),
    "low_rank_add, dropout": ("low_rank_add", DROPS + ALIGNED + 4, 14),
    "low_rank_add, a factor as it is": ("low_rank_add", ALIGNED + 4 + 32, 7),
    "low_rank_add, gain and a factor as it is": ("low_rank_add", ALIGNED + 4 + 8 + 32, 10),
    "low_rank_add, dropout and a factor as it is": ("low_rank_add", DROPS + ALIGNED + 4 + 96, 14),
    "row_norm, rows": ("row_norm", ALIGNED + 1, 4),
    "row_norm, rows and a factor as it is": ("row_norm", ALIGNED + 1 + 4, 6),
    "row_norm, columns": ("row_norm", ALIGNED, 6),
}
BLOCKS = 768


def each_call(*names):
    """Parametrize a test over calls; one of them is not slow."""
    return pytest.mark.parametrize(
        "call",
        [
            pytest.param(call, marks=[pytest.mark.slow] * (call != "project, dropout"))
            for call in names or CALLS
        ],
    )


def figures(call, capability=90):
    """Return the figures of a call's kernel; skip without the tools."""
    if missing := sass_loops.missing_tools(capability):
        pytest.skip(f"Triton's wheel here has no {' and no '.join(missing)}")
    stem, flags, _ = CALLS[call]
    return cuda_figures.figures_of(stem, flags, BLOCKS / MULTIPROCESSORS, capability)


@each_call()
def test_instructions_of_an_element(call):
    assert figures(call).instructions <= CALLS[call][-1], figures(call)


@each_call()
def test_enough_bytes_are_on_their_way(call):
    assert figures(call).bytes_in_flight >= LEAST_IN_FLIGHT, figures(call)


@each_call()
def test_barriers_of_two_steps(call):
    """The warps of a block add their parts of u in each step."""
    adds = call.startswith("grad_output") and CALLS[call][1] & 1
    assert figures(call).barriers == 2 * adds, figures(call)


def test_the_model_has_counts_of_every_form():
    assert set(loop_counts.FORMS) == set(cuda_figures.FORMS)


@pytest.mark.parametrize(
    ("stem", "flags"),
    [
        pytest.param(*form, marks=[pytest.mark.slow] * (form != ("project", DROPS + ALIGNED + 4)))
        for form in cuda_figures.FORMS
    ],
)
def test_the_models_counts_are_those_of_the_code(stem, flags):
    if missing := sass_loops.missing_tools(90):
        pytest.skip(f"Triton's wheel here has no {' and no '.join(missing)}")
    counted = cuda_figures.counts_of(stem, flags, 90)
    assert loop_counts.FORMS[stem, flags] == counted, "run python tools/modelled_steps.py"
