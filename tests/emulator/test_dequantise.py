"""Weights in 4 bits as compiled for a GPU, where neighbours are stored at once: every bit."""

import pytest
import torch
from helpers.four_bit_weights import bits, expected, packed_weight

from emulator import driver
from emulator.process import in_emulator
from lorafast.engine.kernels.dequantise import dequantise_4bit

# The first number, how many, and the blocksize. The first is aligned, as rows of a layer are, and
# the second inside a block; the others are not, and end inside a program.
CASES = [(0, 4096, 64), (2048, 2048, 4096), (33, 1500, 64), (4094, 2, 32), (1, 1, 128)]


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [
        (90, torch.bfloat16),
        (80, torch.bfloat16),
        pytest.param(90, torch.float16, marks=pytest.mark.slow),
        pytest.param(80, torch.float32, marks=pytest.mark.slow),
    ],
)
@in_emulator
def test_numbers_are_torchs_bit_for_bit(capability, dtype):
    for first, count, blocksize in CASES:
        weight = packed_weight(4096, blocksize)
        wide = torch.full((count + 64,), 7.0, dtype=dtype)
        with driver.emulating(capability):
            dequantise_4bit(*weight, blocksize, first, wide[32:-32])
        want = expected(*weight, blocksize, first, count, dtype)
        assert torch.equal(bits(wide[32:-32]), bits(want))
        assert (wide[:32] == 7).all()
        assert (wide[-32:] == 7).all()
