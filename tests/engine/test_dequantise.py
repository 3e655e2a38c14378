"""Weights in 4 bits made dense: bitsandbytes' bits, whole and in parts, and no number beside."""

import itertools
from unittest import mock

import pytest
import torch
from helpers.cpp_compiler import needs_compiler
from helpers.four_bit_weights import DTYPES, assert_parts, bits, expected, packed_weight
from helpers.rotations import rotating, thinned
from torch._subclasses import FakeTensorMode

from lorafast.engine import dequantise
from lorafast.engine.backends import cpu
from lorafast.engine.dequantise import dequantise_4bit
from lorafast.engine.guarded_allocations import GuardedAllocations

KINDS = ("nf4", "fp4")
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


@pytest.fixture(params=["C++", "torch"])
def way(request, monkeypatch):
    """By the kernel in C++, and without one by torch's operations, some blocks at a time."""
    if request.param == "torch":
        monkeypatch.setattr(cpu, "library", lambda: "no kernels")
        monkeypatch.setattr(dequantise, "CPU_ELEMENTS", 4096)
    elif isinstance(cpu.library(), str):
        pytest.skip(cpu.library())


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocksize", [32, 4096, 18])
def test_parts_are_those_of_the_whole(way, dtype, blocksize):
    assert_parts(dequantise_4bit, dtype, blocksize)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_written_or_read_beside(compiled, dtype):
    with GuardedAllocations() as guarded:
        assert_parts(dequantise_4bit, dtype, 64)
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


@pytest.mark.parametrize("dtype", DTYPES)
def test_tritons_kernel_serves_where_it_is_asked_for(monkeypatch, dtype):
    """In the interpreter, but for bf16, which that computes wrongly."""
    kernel = mock.Mock(wraps=dequantise._load())
    monkeypatch.setattr(dequantise, "_load", lambda: kernel)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    weight = packed_weight(301, 64)
    want = expected(*weight, 64, 1, 300, dtype)
    for backend, calls in (("auto", 0), ("triton", dtype is not torch.bfloat16)):
        monkeypatch.setenv("LORAFAST_BACKEND", backend)
        assert torch.equal(dequantise_4bit(*weight, 64, 1, torch.empty(300, dtype=dtype)), want)
        assert kernel.call_count == calls
