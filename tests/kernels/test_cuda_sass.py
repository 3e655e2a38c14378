"""Gates on the machine code of the CUDA kernels, of 8192 tokens through 4096 → 4096 in bf16.

Instructions are counted, and nothing is timed. See tests/kernels/test_sass_loops.py.
"""

import functools

import pytest
import torch
from helpers import sass_loops
from helpers.cuda_compiler import cubin

from lorafast.engine.cuda_forms import ALIGNED, DROPS, Form

BF16 = torch.bfloat16
MULTIPROCESSORS = 132
LEAST_IN_FLIGHT = 24 * 1024
# Elements of the large operand in two steps of a block's loop, which are unrolled.
ELEMENTS = 2 * 4 * 1024
# By call: the form, the bytes of shared memory, and the most instructions for an element.
CALLS = {
    "project": (Form("project", BF16, 2, ALIGNED + 4), 4096, 3),
    "project, dropout": (Form("project", BF16, 2, DROPS + ALIGNED + 4), 4096, 10),
    "grad_project": (Form("grad_project", BF16, 2, ALIGNED), 8192, 3),
    "grad_project, dropout": (Form("grad_project", BF16, 2, DROPS + ALIGNED), 8192, 10),
    "grad_output": (Form("grad_output", BF16, 2, ALIGNED + 1 + 4), 8192, 6),
    "grad_output, bias": (Form("grad_output", BF16, 2, ALIGNED + 1 + 4 + 8), 8192, 6),
    "grad_output, kept": (Form("grad_output", BF16, 2, ALIGNED + 1 + 4 + 24), 8192, 7),
    "grad_output, frozen A": (Form("grad_output", BF16, 2, ALIGNED + 4), 0, 3),
    "low_rank_add": (Form("low_rank_add", BF16, 2, ALIGNED + 4), 0, 6),
    "low_rank_add, gain": (Form("low_rank_add", BF16, 2, ALIGNED + 4 + 8), 0, 9),
    "low_rank_add, dropout": (Form("low_rank_add", BF16, 2, DROPS + ALIGNED + 4), 0, 14),
    "row_norm, rows": (Form("row_norm", BF16, 2, ALIGNED + 1), 0, 4),
    "row_norm, columns": (Form("row_norm", BF16, 2, ALIGNED), 0, 6),
}
WARPS, BLOCKS = 4, 768


def each_call(*names):
    """Parametrize a test over calls; one of them is not slow."""
    return pytest.mark.parametrize(
        "call",
        [
            pytest.param(call, marks=[pytest.mark.slow] * (call != "project, dropout"))
            for call in names or CALLS
        ],
    )


@functools.cache
def figures(call, capability=90):
    """Return the figures of a call's kernel; skip without the tools."""
    if missing := sass_loops.missing_tools(capability):
        pytest.skip(f"Triton's wheel here has no {' and no '.join(missing)}")
    form, shared, _ = CALLS[call]
    return sass_loops.of_kernel(
        {".cubin": cubin(form, capability)}, capability, ELEMENTS, True, WARPS, shared,
        BLOCKS / MULTIPROCESSORS,
    )  # fmt: skip


@each_call()
def test_instructions_of_an_element(call):
    assert figures(call).instructions <= CALLS[call][-1], figures(call)


@each_call()
def test_enough_bytes_are_on_their_way(call):
    assert figures(call).bytes_in_flight >= LEAST_IN_FLIGHT, figures(call)


@each_call()
def test_barriers_of_two_steps(call):
    """The warps of a block add their parts of u in each step."""
    adds = call.startswith("grad_output") and CALLS[call][0].flags & 1
    assert figures(call).barriers == 2 * adds, figures(call)
