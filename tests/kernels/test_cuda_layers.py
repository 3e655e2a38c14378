"""Whole layers of every method by LORAFAST_BACKEND=cuda, compiled for sm_80 and sm_90."""

import pytest
import torch
from helpers.cuda_compiler import skip_without_nvcc
from helpers.emulated_cuda import emulating

from lorafast import testing

BF16, FP16 = torch.bfloat16, torch.float16
# M, N, K and R.
SIZES = (
    (63, 72, 136, 8), (17, 130, 72, 12), (64, 136, 128, 16), (33, 257, 130, 24), (130, 64, 72, 64),
    (1, 72, 64, 4),
)  # fmt: skip


def cases():
    """Yield (capability, case, parts) of every form; each in one dtype, with dropout or without."""
    for i, form in enumerate(testing.FORMS):
        dtype, p = (BF16, FP16, BF16)[i % 3], (0.3, 0.0)[i // 2 % 2]
        sizes, transposed = SIZES[i % len(SIZES)], i % 4 == 3
        case = testing.Case(form, *sizes, dtype, p, bias=i % 3 != 1, transposed=transposed)
        yield (90, 80)[i % 2], case if case.works else testing.Case(form, *sizes, dtype), 1 + i % 3


QUICK = (90, testing.Case(testing.FORMS[0], 33, 72, 136, 8, BF16, 0.3), 2)


@pytest.mark.parametrize(
    ("capability", "case", "parts"),
    [QUICK, *(pytest.param(*one, marks=pytest.mark.slow) for one in cases())],
    ids=str,
)
def test_layers_obey_the_rule(capability, case, parts):
    skip_without_nvcc()
    with emulating(capability, parts):
        ratios = testing.error_ratios(case, seeds=range(2))
    assert max(ratios.values()) <= 2, ratios
