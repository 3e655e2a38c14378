"""Weights in 4 bits made dense: bitsandbytes' bits, whole and in parts, and no number beside."""

import itertools
from unittest import mock

import pytest
import torch
from helpers.cpp_compiler import needs_compiler
from helpers.rotations import rotating, thinned
from torch._subclasses import FakeTensorMode

from lorafast.engine import dequantise
from lorafast.engine.backends import cpu
from lorafast.engine.dequantise import dequantise_4bit
from lorafast.engine.guarded_allocations import GuardedAllocations

KINDS = ("nf4", "fp4")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Shapes and blocksizes: whole blocks, ends inside a block, odd sizes and rows, long blocks.
CASES = [
    ((12, 64), 64),
    ((5, 4096), 128),
    ((3, 130), 64),
    ((7, 33), 128),
    ((2, 6000), 4096),
    ((1, 1), 64),
    ((8191,), 32),
]
# The first number and how many: at the start, at an odd one, inside a block, to the end, across
# the tasks of a thread, and none.
PARTS = [
    (0, 64), (1, 1), (1, 30), (33, 64), (62, 5), (64, 129), (127, 2), (1000, 3001), (32767, 37000),
    (65535, 2), (70000, 0), (69999, 2),
]  # fmt: skip


@pytest.fixture(params=["C++", "torch"])
def way(request, monkeypatch):
    """By the kernel in C++, and without one by torch's operations, some blocks at a time."""
    if request.param == "torch":
        monkeypatch.setattr(cpu, "library", lambda: "no kernels")
        monkeypatch.setattr(dequantise, "CPU_ELEMENTS", 4096)
    elif isinstance(cpu.library(), str):
        pytest.skip(cpu.library())


def bits(numbers):
    """The bits of numbers. bitsandbytes' kernels differ in the sign of the zero that fp4 has twice,
    and its code has +0 for both.
    """
    return (numbers + 0.0).view(torch.int32 if numbers.itemsize == 4 else torch.int16)


def packed_weight(count, blocksize):
    """Return packed, absmax and code of random halves of bytes."""
    packed = torch.randint(0, 256, (-(-count // 2),), dtype=torch.uint8)
    absmax = torch.randn(-(-count // blocksize)).exp()
    return packed, absmax, torch.randn(16)


def expected(packed, absmax, code, blocksize, first, count, dtype):
    """Return the numbers by torch's operations, all at once."""
    halves = torch.stack((packed >> 4, packed & 15), 1).view(-1)[first : first + count].long()
    blocks = torch.arange(first, first + count) // blocksize
    return (code[halves] * absmax[blocks]).to(dtype)


@pytest.fixture
def bitsandbytes():
    """Its functions, whose generic way torch would compile for each shape."""
    functional = pytest.importorskip("bitsandbytes.functional")
    with torch._dynamo.config.patch(disable=True):
        yield functional


def assert_bitsandbytes_bits(functional, shape, blocksize, kind, dtype):
    W = torch.randn(shape).to(dtype)
    packed, state = functional.quantize_4bit(W, blocksize=blocksize, quant_type=kind)
    want = functional.dequantize_4bit(packed, state).reshape(shape)
    out = torch.full(shape, torch.nan, dtype=dtype)
    assert dequantise_4bit(packed, state.absmax, state.code, blocksize, 0, out) is out
    assert torch.equal(bits(out), bits(want))


@pytest.mark.parametrize(
    ("case", "kind", "dtype"), thinned(itertools.product(CASES, KINDS, DTYPES), 5)
)
def test_bits_are_those_of_bitsandbytes(bitsandbytes, way, case, kind, dtype):
    assert_bitsandbytes_bits(bitsandbytes, *case, kind, dtype)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_are_those_of_bitsandbytes_in_every_instruction_set(compiled, bitsandbytes, dtype):
    for case, kind in rotating(CASES, KINDS):
        assert_bitsandbytes_bits(bitsandbytes, *case, kind, dtype)


def test_rows_that_end_inside_a_block(bitsandbytes, way):
    """bitsandbytes 0.50.2 computes other numbers here on a CPU with AVX-512: its kernel begins a
    block with each row. It quantises along the flattened weight, as its operations dequantise.
    """
    from bitsandbytes.backends.default import ops

    W = torch.randn(10, 96)
    packed, state = bitsandbytes.quantize_4bit(W, blocksize=64, quant_type="nf4")
    want = ops._dequantize_4bit_compute(
        packed.view(-1), state.absmax, state.code, 64, W.shape, W.dtype
    )
    out = dequantise_4bit(packed, state.absmax, state.code, 64, 0, torch.empty_like(W))
    assert torch.equal(bits(out), bits(want))
    # Half the distance between two numbers of the code, at most.
    assert (out - W).abs().max() < 0.16 * state.absmax.max()


def assert_parts(dtype, blocksize):
    weight = packed_weight(70001, blocksize)
    for first, count in PARTS:
        out = torch.empty(count, dtype=dtype)
        dequantise_4bit(*weight, blocksize, first, out)
        assert torch.equal(bits(out), bits(expected(*weight, blocksize, first, count, dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocksize", [32, 4096, 18])
def test_parts_are_those_of_the_whole(way, dtype, blocksize):
    assert_parts(dtype, blocksize)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_written_or_read_beside(compiled, dtype):
    with GuardedAllocations() as guarded:
        assert_parts(dtype, 64)
    assert guarded.whole
    # Another absmax or code than these would be seen.
    packed, absmax, code = packed_weight(900, 64)
    beside = [torch.full((size + 2,), torch.nan) for size in (5, 16)]
    beside[0][1:-1], beside[1][1:-1] = absmax[3:8], code
    out = torch.empty(5 * 64, dtype=dtype)
    dequantise_4bit(packed[96:256], beside[0][1:-1], beside[1][1:-1], 64, 0, out)
    assert torch.equal(bits(out), bits(expected(packed, absmax, code, 64, 192, 320, dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_the_number_of_threads(dtype):
    before, weight = torch.get_num_threads(), packed_weight(300_001, 64)
    outs = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = torch.empty(299_990, dtype=dtype)
            outs.append(dequantise_4bit(*weight, 64, 11, out))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(outs[0], expected(*weight, 64, 11, 299_990, dtype))
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_and_nans_stay_in_their_block(way, dtype):
    packed, absmax, code = packed_weight(5 * 64, 64)
    code[3], absmax[1], absmax[3], absmax[4] = 0.0, torch.inf, torch.nan, 1e9
    want = expected(packed, absmax, code, 64, 0, 320, dtype)
    out = dequantise_4bit(packed, absmax, code, 64, 0, torch.empty(320, dtype=dtype))
    assert torch.equal(out.nan_to_num(12345), want.nan_to_num(12345))
    assert out[192:256].isnan().all()
    assert not out[:64].isnan().any()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"packed": torch.zeros(31, dtype=torch.uint8)}, "packed holds 62 numbers"),
        ({"absmax": torch.ones(1)}, "absmax 1 blocks"),
        ({"code": torch.ones(15)}, "code 15 numbers"),
        ({"first": 1}, "up to number 65"),
        ({"first": -1}, "first=-1"),
        ({"blocksize": 0}, "blocksize=0"),
        ({"blocksize": 33}, "blocksize=33"),
        ({"packed": torch.zeros(32, dtype=torch.int8)}, "packed must be dense torch.uint8"),
        ({"absmax": torch.ones(2).bfloat16()}, "absmax must be dense torch.float32"),
        ({"absmax": torch.ones(4)[::2]}, "absmax must be dense"),
        ({"code": torch.ones(16).double()}, "code must be dense torch.float32"),
        ({"out": torch.ones(8, 8).t()[:, 1:]}, "out must be dense"),
        ({"out": torch.ones(8).double()}, "out must be dense torch.float32 or"),
        ({"code": torch.ones(16, device="meta")}, "code is on meta"),
    ],
)
def test_what_does_not_fit_is_an_error_and_nothing_is_written(changes, words):
    given = {
        "packed": torch.zeros(32, dtype=torch.uint8), "absmax": torch.ones(2),
        "code": torch.ones(16), "blocksize": 32, "first": 0, "out": torch.full((8, 8), 7.0),
    }  # fmt: skip
    with pytest.raises(ValueError, match=words):
        dequantise_4bit(**(given | changes))
    assert (given["out"] == 7).all()


@needs_compiler
def test_the_kernel_serves_what_is_in_memory(monkeypatch):
    weight, kernels = packed_weight(640, 64), mock.Mock(wraps=cpu.library())
    monkeypatch.setattr(cpu, "library", lambda: kernels)
    want = expected(*weight, 64, 0, 640, torch.float32)
    for backend, calls in (("auto", 1), ("cpu", 2), ("eager", 2), ("triton", 2)):
        monkeypatch.setenv("LORAFAST_BACKEND", backend)
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        assert torch.equal(dequantise_4bit(*weight, 64, 0, torch.empty(640)), want)
        assert kernels.dequantise_4bit.call_count == calls
    monkeypatch.delenv("LORAFAST_BACKEND")
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(one) for one in weight]
        assert dequantise_4bit(*fakes, 64, 0, torch.empty(8, 80)).shape == (8, 80)
    assert kernels.dequantise_4bit.call_count == 2
