"""lorafast.merge_quantised: the weights it makes, the errors it tells, and what it refuses."""

import copy

import pytest
import torch
from torch import nn

import lorafast
from lorafast.quantised import formats

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")


def packed(n, k, make=bnb.nn.Linear4bit, **options):
    """Return a quantised layer of bitsandbytes with random weights."""
    module = make(k, n, **options)
    module.load_state_dict(nn.Linear(k, n).state_dict())
    return module.to("cpu")


def adapted(adapter, *first, **options):
    """Return a trained model with a quantised and a dense layer."""
    torch.manual_seed(0)
    model = nn.Sequential(packed(48, 64, *first, **options), nn.Linear(48, 8))
    lorafast.adapt(model, adapter, bias="lora_only" if adapter.lora_bias else "none")
    for parameter in lorafast.adapter_parameters(model):
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize(
    "adapter", [lorafast.LoRA(r=4), lorafast.DoRA(r=4), lorafast.DoRA(r=4, axis="in")], ids=str
)
def test_dense_weights_give_what_the_adapted_model_gave(adapter):
    model = adapted(adapter)
    x = torch.randn(9, 64)
    y = model(x)
    errors = lorafast.merge_quantised(model, "dequantise")
    assert errors == {"0": 0.0}
    assert type(model[0]) is nn.Linear
    assert not model[0].weight.requires_grad
    torch.testing.assert_close(model(x), y)
    lorafast.merge(model)
    assert type(model[1]) is nn.Linear
    torch.testing.assert_close(model(x), y)


@pytest.mark.parametrize("into", ["dequantise", "requantise"])
def test_the_error_is_that_of_what_is_stored(into):
    model = adapted(lorafast.LoRA(r=4))
    exact = model[0].merge_parts().weight
    dtype = torch.bfloat16 if into == "dequantise" else None
    (error,) = lorafast.merge_quantised(model, into, dtype).values()
    weight = formats.of(model[0])
    stored = weight.whole(torch.empty(48, 64)) if weight else model[0].weight.float()
    assert error == pytest.approx(((stored - exact).norm() / exact.norm()).item(), rel=1e-4)
    assert (1e-4 < error < 1e-2) if weight is None else (0.01 < error < 0.2)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (bnb.nn.Linear4bit, {"quant_type": "nf4", "compress_statistics": True}),
        (bnb.nn.Linear4bit, {"quant_type": "fp4", "compress_statistics": False}),
        (bnb.nn.Linear8bitLt, {"has_fp16_weights": False}),
    ],
)
def test_a_requantised_module_keeps_its_options(make, options):
    model = adapted(lorafast.LoRA(r=4), make, **options)
    base, kind = model[0].base_layer, model[0].quantised.kind
    before = base.weight.data.clone()
    lorafast.merge_quantised(model, "requantise")
    assert (type(model[0]), formats.of(model[0]).kind) == (make, kind)
    assert not torch.equal(model[0].weight.data, before)
    assert torch.equal(base.weight.data, before)
    assert model[0](torch.randn(9, 64)).shape == (9, 48)


def test_lora_bias_is_merged():
    model = adapted(lorafast.LoRA(r=4, lora_bias=True))
    nn.init.normal_(model[0].lora_bias)
    x = torch.randn(9, 64)
    y = model(x)
    for into in ("dequantise", "requantise"):
        merged = copy.deepcopy(model)
        lorafast.merge_quantised(merged, into)
        torch.testing.assert_close(merged(x), y, rtol=0.2, atol=0.2)
        torch.testing.assert_close(merged[0].bias, model[0].bias + 2 * model[0].lora_bias)


def test_merge_says_what_to_do_and_changes_nothing():
    model = adapted(lorafast.LoRA(r=4))
    layers = [*model]
    with pytest.raises(RuntimeError, match=r"fp4.*lorafast\.merge_quantised\(model"):
        lorafast.merge(model)
    with pytest.raises(RuntimeError, match="fp4"):
        model[0].merge()
    assert [*model] == layers


@pytest.mark.parametrize(
    ("arguments", "error", "why"),
    [
        (("dense",), ValueError, r"into='dense' must be one of 'dequantise', 'requantise'"),
        (("requantise", torch.bfloat16), ValueError, "leave it out with 'requantise'"),
        (("dequantise", torch.float64), TypeError, r"dtype=torch\.float64 must be one of"),
    ],
)
def test_wrong_arguments(arguments, error, why):
    model = adapted(lorafast.LoRA(r=4))
    layers = [*model]
    with pytest.raises(error, match=why):
        lorafast.merge_quantised(model, *arguments)
    assert [*model] == layers


def test_what_is_not_finite_or_not_quantised_is_refused():
    model = adapted(lorafast.LoRA(r=4))
    nn.init.constant_(model[0].lora_B, float("inf"))
    with pytest.raises(ValueError, match=r"weight \(48, 64\) with its adapter folded in is not"):
        lorafast.merge_quantised(model, "dequantise")
    dense = lorafast.adapt(nn.Sequential(nn.Linear(8, 8)), lorafast.LoRA(r=2))
    with pytest.raises(ValueError, match=r"use lorafast\.merge"):
        lorafast.merge_quantised(dense, "dequantise")
