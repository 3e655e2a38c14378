"""Random weights in 4 bits, and the numbers that they stand for."""

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The first number and how many: at the start, at an odd one, inside a block, to the end, across
# tasks and programs, and none. Of a weight of NUMBERS.
NUMBERS = 70001
PARTS = [
    (0, 64), (1, 1), (1, 30), (33, 64), (62, 5), (64, 129), (127, 2), (1000, 3001), (32767, 37000),
    (65535, 2), (70000, 0), (69999, 2),
]  # fmt: skip


def packed_weight(count, blocksize):
    """Return packed, absmax and code of random numbers."""
    packed = torch.randint(0, 256, (-(-count // 2),), dtype=torch.uint8)
    absmax = torch.randn(-(-count // blocksize)).exp()
    return packed, absmax, torch.randn(16)


def expected(packed, absmax, code, blocksize, first, count, dtype):
    """Return the numbers by torch's operations, all at once."""
    halves = torch.stack((packed >> 4, packed & 15), 1).view(-1)[first : first + count].long()
    blocks = torch.arange(first, first + count) // blocksize
    return (code[halves] * absmax[blocks]).to(dtype)


def bits(numbers):
    """Return the bits of numbers, of either zero those of +0.

    bitsandbytes' kernels differ in the sign of the zero that fp4 has twice; its code has +0.
    """
    return (numbers + 0.0).view(torch.int32 if numbers.itemsize == 4 else torch.int16)


def assert_parts(dequantise_4bit, dtype, blocksize):
    """Assert that PARTS of a weight have the bits of the whole."""
    weight = packed_weight(NUMBERS, blocksize)
    for first, count in PARTS:
        out = torch.empty(count, dtype=dtype)
        dequantise_4bit(*weight, blocksize, first, out)
        assert torch.equal(bits(out), bits(expected(*weight, blocksize, first, count, dtype)))
