"""Whole layers of every method as compiled for sm_80 and sm_90: forward and backward, by the rule.

Every primitive of a layer runs by LORAFAST_BACKEND=triton on the emulator.
"""

import pytest
import torch
from emulator.process import in_emulator
from helpers.emulated_device import emulated

from lorafast import testing

BF16, FP16 = torch.bfloat16, torch.float16
# M, N, K and R.
SIZES = (
    (63, 72, 136, 8), (17, 130, 72, 12), (64, 136, 128, 16), (33, 257, 130, 24), (130, 64, 72, 64),
    (1, 72, 64, 4),
)  # fmt: skip


def cases():
    """Yield (capability, case, fused) of every form; each in one dtype, with dropout or without."""
    for i, form in enumerate(testing.FORMS):
        dtype, p = (BF16, BF16, FP16)[i % 3], (0.3, 0.0)[i // 2 % 2]
        sizes, transposed = SIZES[i % len(SIZES)], i % 4 == 3
        case = testing.Case(form, *sizes, dtype, p, bias=i % 3 != 1, transposed=transposed)
        yield (90, 80)[i % 2], case if case.works else testing.Case(form, *sizes, dtype), i % 3 < 2


QUICK = (90, testing.Case(testing.FORMS[0], 33, 72, 136, 8, BF16, 0.3), True)


@pytest.mark.parametrize(
    ("capability", "case", "fused"),
    [QUICK, *(pytest.param(*one, marks=pytest.mark.slow) for one in cases())],
    ids=str,
)
@in_emulator
def test_layers_obey_the_rule(capability, case, fused):
    with emulated(capability, fused):
        ratios = testing.error_ratios(case, seeds=range(2))
    assert max(ratios.values()) <= 2, ratios
