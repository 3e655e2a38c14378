"""What the machine code of the CUDA kernels does, in their forms of up to 16 ranks in bf16."""

from __future__ import annotations

import functools

import torch

from helpers import sass_loops
from helpers.cuda_compiler import cubin
from lorafast.engine.cuda_forms import ALIGNED, DROPS, Form
from lorafast.engine.kernels.loop_counts import FormCounts

TILES = 2
# Elements of the large operand in two steps of a warp's loop, which are unrolled.
ELEMENTS = 2 * 1024
# Bytes of shared memory, by the stem and the flags of each form whose loop is counted.
FORMS = {
    ("project", ALIGNED + 4): 4096,
    ("project", DROPS + ALIGNED + 4): 4096,
    # With a factor as it is.
    ("project", ALIGNED + 4 + 8): 4096,
    ("project", DROPS + ALIGNED + 4 + 8): 4096,
    ("decode", 0): 16384,
    ("decode", 4): 16384,
    ("grad_project", ALIGNED): 8192,
    ("grad_project", DROPS + ALIGNED): 8192,
    ("grad_output", ALIGNED + 1 + 4): 16384,
    ("grad_output", ALIGNED + 1 + 4 + 8): 16384,
    ("grad_output", ALIGNED + 1 + 4 + 24): 16384,
    ("grad_output", ALIGNED + 4): 0,
    ("low_rank_add", ALIGNED): 0,
    ("low_rank_add", ALIGNED + 8): 0,
    ("low_rank_add", ALIGNED + 4): 0,
    ("low_rank_add", ALIGNED + 4 + 8): 0,
    ("low_rank_add", DROPS + ALIGNED): 0,
    ("low_rank_add", DROPS + ALIGNED + 4): 0,
    # With a factor as it is: B by rows, and A across.
    ("low_rank_add", ALIGNED + 32): 0,
    ("low_rank_add", ALIGNED + 8 + 32): 0,
    ("low_rank_add", ALIGNED + 4 + 32): 0,
    ("low_rank_add", ALIGNED + 4 + 8 + 32): 0,
    ("low_rank_add", ALIGNED + 96): 0,
    ("low_rank_add", ALIGNED + 4 + 96): 0,
    ("low_rank_add", DROPS + ALIGNED + 96): 0,
    ("low_rank_add", DROPS + ALIGNED + 4 + 96): 0,
    ("row_norm", ALIGNED + 1): 1536,
    # With A as it is, across.
    ("row_norm", ALIGNED + 1 + 4): 1536,
    ("row_norm", ALIGNED): 1536,
}


@functools.cache
def figures_of(stem: str, flags: int, programs: float, capability: int) -> sass_loops.Figures:
    """Return the figures of a form. programs: the blocks of its grid by the multiprocessors."""
    form = Form(stem, torch.bfloat16, TILES, flags)
    warps = form.threads // 32
    return sass_loops.of_kernel(
        {".cubin": cubin(form, capability)}, capability, warps * ELEMENTS, True, warps,
        FORMS[stem, flags], programs,
    )  # fmt: skip


def counts_of(stem: str, flags: int, capability: int) -> FormCounts:
    """Return a form's entry in kernels/loop_counts.py, to four digits."""
    found = figures_of(stem, flags, 1, capability)
    instructions, alu = (float(f"{number:.4g}") for number in (found.instructions, found.alu))
    return FormCounts(instructions, alu, round(found.bytes_in_flight), found.blocks)
