"""grad_output as compiled for sm_90: no product reads dy's buffer when later loads overwrite it."""

import itertools

import pytest
import torch
from helpers.emulated_device import nvidia

from emulator import driver
from emulator.process import in_emulator
from lorafast.engine.kernels.grad_output import grad_output
from lorafast.engine.problem import UpProjGradSpec

# R, want_v, and the sums: none, Σ dy, and Σ dy⊙kept.
FORMS = list(itertools.product((16, 64, 128, 256), (True, False), ("", "bias", "kept")))
QUICK = [(16, True, "kept"), (64, False, "bias")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "form", [pytest.param(form, marks=[pytest.mark.slow] * (form not in QUICK)) for form in FORMS]
)
@in_emulator
def test_every_form_is_free_of_races_and_right(form, dtype):
    """With several steps a program, and rows aligned for asynchronous loads."""
    R, want_v, sums = form
    M, N = 272, 320
    dy, h, kept = (torch.randn(M, width).to(dtype) for width in (N, R, N))
    B = (torch.randn(N, R) * R**-0.5).to(dtype)
    spec = UpProjGradSpec(B, h=h, want_v=want_v, want_B=True)
    with nvidia(90), driver.emulating(90):
        grads = grad_output(dy, [spec], None, kept if sums == "kept" else None, sums == "bias")
    wide = dy.double()
    (adapter,) = grads.adapters
    close(adapter.dB, wide.t() @ h.double(), 1e-6)
    if want_v:
        close(adapter.v, wide @ B.double(), torch.finfo(dtype).eps)
    if sums == "bias":
        close(grads.d_bias, wide.sum(0), 1e-6)
    if sums == "kept":
        close(grads.dot, (wide * kept.double()).sum(0), 1e-6)


def close(found, truth, bound):
    """Assert that the error is at most `bound` of the truth, both as root mean squares."""
    assert (found.double() - truth).norm() <= bound * truth.norm()
