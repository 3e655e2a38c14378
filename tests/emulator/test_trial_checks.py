"""A trial's check of kernels as compiled for sm_90 and sm_80, in bf16, which no interpreter has."""

import pytest
import torch
from helpers.emulated_device import nvidia

from emulator import driver
from emulator.process import in_emulator
from lorafast.engine import trial_checks
from lorafast.engine.kernel_cases import Sizes
from lorafast.engine.trial_forms import GEMMS, STREAMS, Form

SIZES = [Sizes(80, 128, 64, 16, 0.05), Sizes(45, 51, 37, 16, 0.0)]
QUICK = [("project", 90)]
FORMS = [
    pytest.param(kernel, capability, marks=[pytest.mark.slow] * ((kernel, capability) not in QUICK))
    for kernel in (*STREAMS, *GEMMS)
    for capability in (80, 90)
    if (kernel, capability) != ("gemm_tma", 80)
]


@pytest.mark.parametrize(("kernel", "capability"), FORMS)
@in_emulator
def test_a_right_kernel_passes(kernel, capability):
    trial_checks.MASKS = ((7, 43), (16, 64))
    with nvidia(capability), driver.emulating(capability):
        reason = trial_checks.check(Form(kernel, torch.bfloat16), torch.device("cpu"), SIZES)
    assert reason == ""
