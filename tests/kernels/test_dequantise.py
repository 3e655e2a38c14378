"""The kernel for weights in 4 bits, in Triton's interpreter: bits of parts, guards, far numbers."""

import pytest
import torch
from helpers.four_bit_weights import assert_parts, bits, expected, packed_weight
from helpers.triton_interpreter import DTYPES

from lorafast.engine.kernels.dequantise import dequantise_4bit


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocksize", [64, 4096, pytest.param(32, marks=pytest.mark.slow)])
def test_parts_are_those_of_the_whole(dtype, blocksize):
    assert_parts(dequantise_4bit, dtype, blocksize)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_written_beside(dtype):
    weight = packed_weight(900, 64)
    for first, count in ((0, 900), (3, 500), (130, 7), (450, 449)):
        wide = torch.full((count + 200,), 7.0, dtype=dtype)
        dequantise_4bit(*weight, 64, first, wide[100:-100])
        want = bits(expected(*weight, 64, first, count, dtype))
        assert torch.equal(bits(wide[100:-100]), want)
        assert (wide[:100] == 7).all()
        assert (wide[-100:] == 7).all()


def test_every_shape_is_filled():
    weight = packed_weight(17 * 35, 64)
    out = torch.empty(17, 35)
    dequantise_4bit(*weight, 64, 0, out)
    assert torch.equal(out.view(-1), expected(*weight, 64, 0, 17 * 35, torch.float32))


def test_numbers_beyond_2_to_the_32(tmp_path):
    """The file is sparse: only pages that are written take space."""
    first, (near, absmax, code) = 2**32 + 37, packed_weight(4096, 4096)
    packed = torch.from_file(
        str(tmp_path / "sparse"), shared=True, size=2**31 + 2048, dtype=torch.uint8
    )
    packed[2**31 :] = near
    scales = torch.from_file(str(tmp_path / "scales"), shared=True, size=2**20 + 1)
    scales[2**20] = absmax[0]
    out = torch.empty(1000)
    dequantise_4bit(packed, scales, code, 4096, first, out)
    assert torch.equal(out, expected(near, absmax, code, 4096, 37, 1000, torch.float32))
