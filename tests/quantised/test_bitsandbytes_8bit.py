"""Weights of bitsandbytes' Linear8bitLt: the bits of its own dequantisation, in every state."""

import copy
import io

import pytest
import torch
from torch import nn

import lorafast
from lorafast.quantised import formats

bnb = pytest.importorskip("bitsandbytes")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def linear8bit(N, K, **options):
    """A quantised layer without bias."""
    module = bnb.nn.Linear8bitLt(K, N, bias=False, has_fp16_weights=False, **options)
    module.weight.data = torch.randn(N, K, generator=torch.Generator().manual_seed(N * 1000 + K))
    return module.to("cpu")


def dequantised(module):
    """bitsandbytes' own W, as PEFT takes it."""
    row_max = module.weight.SCB if module.state.SCB is None else module.state.SCB
    return bnb.functional.int8_vectorwise_dequant(module.weight.data, row_max)


def whole(module, dtype=torch.float32):
    """W as lorafast reads it."""
    weight = formats.of(module)
    assert weight.why_not() is None
    return weight.whole(torch.empty(weight.shape, dtype=dtype))


def _pickled(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _called(module):
    """The first forward moves CB and SCB to the state."""
    module(torch.randn(3, module.in_features, dtype=torch.float16))
    assert module.weight.SCB is None
    return module


def _loaded(module):
    fresh = linear8bit(module.out_features, module.in_features)
    fresh.weight.data.zero_()
    fresh.load_state_dict(module.state_dict())
    return fresh


MOVES = {
    "none": lambda module: module,
    "called": _called,
    "called in eval": lambda module: _called(module.eval()),
    "half": lambda module: module.half(),
    "bfloat16": lambda module: _called(module).to(torch.bfloat16),
    "deepcopy": copy.deepcopy,
    "deepcopy after a call": lambda module: copy.deepcopy(_called(module)),
    "pickle": _pickled,
    "pickle after a call": lambda module: _pickled(_called(module)),
    "state_dict": _loaded,
    "state_dict after a call": lambda module: _loaded(_called(module)),
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("shape", [(37, 65), (1, 8)])
def test_the_bits_are_those_of_bitsandbytes(shape, move):
    module = linear8bit(*shape, threshold=6.0)
    right = dequantised(module)
    module = MOVES[move](module)
    for dtype in DTYPES:
        assert torch.equal(whole(module, dtype), right.to(dtype))
        for start, stop in ((0, 1), (shape[0] // 2, shape[0])):
            rows = formats.of(module).rows(start, stop, dtype)
            assert torch.equal(rows, right.to(dtype)[start:stop])


@pytest.mark.parametrize("called", [False, True])
def test_requantising_is_quantising_anew(called):
    module = linear8bit(8, 32)
    if called:
        _called(module)
    held, W = module.weight, torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
    anew = bnb.nn.Linear8bitLt(32, 8, bias=False, has_fp16_weights=False)
    anew.weight.data = W.clone()
    right = dequantised(anew.to("cpu"))
    formats.of(module).requantise(W.double())
    assert module.weight is held
    # PEFT reads the state first.
    assert torch.equal(dequantised(module), right)
    x = torch.randn(3, 32, dtype=torch.float16)
    for _ in range(2):
        assert torch.equal(whole(module), right)
        assert torch.equal(module(x), anew(x))


def test_what_it_says_of_itself():
    weight = formats.of(linear8bit(8, 32))
    assert (weight.kind, weight.shape) == ("bitsandbytes int8", (8, 32))
    assert (weight.dtype, weight.device) == (torch.float16, torch.device("cpu"))
    with_bias = bnb.nn.Linear8bitLt(32, 8, has_fp16_weights=False).to(torch.bfloat16)
    assert formats.of(with_bias).dtype == torch.bfloat16


def test_a_weight_that_cannot_be_read_is_one_reason():
    def reason(module):
        return formats.of(module).why_not()

    assert "has_fp16_weights=True" in reason(bnb.nn.Linear8bitLt(8, 8).to("cpu"))
    assert "not quantised yet" in reason(bnb.nn.Linear8bitLt(8, 8, has_fp16_weights=False))
    meta = bnb.nn.Linear8bitLt(8, 8, has_fp16_weights=False, device="meta")
    assert "meta device" in reason(meta)
    module = linear8bit(8, 32)
    module.weight.SCB = module.weight.SCB[:-1]
    assert reason(module) == "its SCB is [7] and should be [8]"
    module.weight.SCB = None
    assert reason(module) == "its SCB is missing; it should be [8]"
    module.in_features = 31
    assert reason(module) == "its weight is [8, 32] and should be [8, 31]"
    with pytest.raises(NotImplementedError, match="its weight is"):
        formats.of(module).requantise(torch.zeros(8, 31))


@pytest.mark.parametrize("called", [False, True])
def test_a_lost_scb_is_an_error_of_the_next_call(called):
    model = nn.Sequential(linear8bit(8, 32))
    if called:
        _called(model[0])
    lorafast.adapt(model, lorafast.LoRA(r=2), target_modules=["0"])
    base = model[0].base_layer
    # As a module looks whose Parameter was made anew from its data.
    base.weight, base.state.SCB = nn.Parameter(base.weight.data, requires_grad=False), None
    for dtype in DTYPES:
        with pytest.raises(RuntimeError, match=r"its SCB is missing; it should be \[8\]"):
            model(torch.randn(3, 32, dtype=dtype))
    with pytest.raises(RuntimeError, match="its SCB is missing"):
        model[0].quantised.rows(0, 1, torch.float32)
