"""row_norm as compiled, whose factors tensor cores cut to tf32: next to weights of 16 bits."""

import itertools

import pytest
import torch
from helpers.emulated_device import nvidia
from helpers.triton_interpreter import within_twice

from emulator import driver
from emulator.process import in_emulator
from lorafast.engine.backends import eager
from lorafast.engine.kernels.row_norm import row_norm

FORMS = list(itertools.product((16, 64, 200), ("out", "in"), (80, 90)))
QUICK = [(16, "out", 90), (64, "in", 90)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "form", [pytest.param(form, marks=[pytest.mark.slow] * (form not in QUICK)) for form in FORMS]
)
@in_emulator
def test_an_adapter_as_large_as_its_weight_has_the_norm_of_fp32(form, dtype):
    """Operands that are cut, not rounded, would make |BA| smaller by 6e-4."""
    R, axis, capability = form
    N, K = 320, 257
    for share in (0.1, 1.0, 3.0):
        W = (torch.randn(N, K) * K**-0.5).to(dtype)
        A, B = torch.randn(R, K) * K**-0.5, torch.randn(N, R) * R**-0.5 * share
        with nvidia(capability), driver.emulating(capability):
            ours = row_norm(W, A, B, 1.0, axis)
        truth = (W.double() + B.double() @ A.double()).norm(dim=1 if axis == "out" else 0)
        within_twice([ours], [eager.row_norm(W, A, B, 1.0, axis)], [truth], dtype)
