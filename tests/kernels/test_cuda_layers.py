"""Whole layers of every method by LORAFAST_BACKEND=cuda, compiled for sm_80 and sm_90."""

import pytest
import torch
from helpers.cuda_compiler import needs_nvcc
from helpers.emulated_cuda import emulating
from helpers.layer_cases import QUICK, every_form

from lorafast import testing

BF16, FP16 = torch.bfloat16, torch.float16
SLOW = [(sm, case, 1 + i % 3) for i, sm, case in every_form(BF16, FP16, BF16)]


@needs_nvcc
@pytest.mark.parametrize(
    ("capability", "case", "parts"),
    [(*QUICK, 2), *(pytest.param(*one, marks=pytest.mark.slow) for one in SLOW)],
    ids=str,
)
def test_layers_obey_the_rule(capability, case, parts):
    with emulating(capability, parts):
        ratios = testing.error_ratios(case, seeds=range(2))
    assert max(ratios.values()) <= 2, ratios
