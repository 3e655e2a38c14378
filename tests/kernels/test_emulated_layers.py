"""Whole layers of every method as compiled for sm_80 and sm_90: forward and backward, by the rule.

Every primitive of a layer runs by LORAFAST_BACKEND=triton on the emulator.
"""

import pytest
import torch
from emulator.process import in_emulator
from helpers.emulated_device import emulated
from helpers.layer_cases import QUICK, every_form

from lorafast import testing

BF16, FP16 = torch.bfloat16, torch.float16
SLOW = [(sm, case, i % 3 < 2) for i, sm, case in every_form(BF16, BF16, FP16)]


@pytest.mark.parametrize(
    ("capability", "case", "fused"),
    [(*QUICK, True), *(pytest.param(*one, marks=pytest.mark.slow) for one in SLOW)],
    ids=str,
)
@in_emulator
def test_layers_obey_the_rule(capability, case, fused):
    with emulated(capability, fused):
        ratios = testing.error_ratios(case, seeds=range(2))
    assert max(ratios.values()) <= 2, ratios
