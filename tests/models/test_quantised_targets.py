"""Quantised targets in a model: trained biases, modules to save, hooks, and what adapt reads."""

import copy

import pytest
import torch
from helpers.quantised_layers import int8, quantised
from torch import nn

import lorafast
from lorafast.quantised import formats

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

K, N = 128, 96


def train_biases(model, x):
    """Train what the adapter file of the model holds for two steps."""
    optimizer = torch.optim.SGD(lorafast.adapter_parameters(model), lr=1e-2)
    for _ in range(2):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_its_bias_trains_as_the_dense_layers_does(bias, tmp_path):
    torch.manual_seed(0)
    linear, x = nn.Linear(K, N), torch.randn(20, K)
    packed = nn.Sequential(quantised(linear))
    base, initial = copy.deepcopy(packed), linear.bias.detach().clone()
    lorafast.adapt(packed, lorafast.LoRA(r=4), bias=bias, seed=1)
    linear.weight.data.copy_(packed[0].dequantised(torch.float32))
    dense = lorafast.adapt(nn.Sequential(linear), lorafast.LoRA(r=4), bias=bias, seed=1)
    keys = set(packed.state_dict())
    assert packed[0].bias.requires_grad
    assert lorafast.trainable_summary(packed).parts["bias"] == N
    for model in (dense, packed):
        train_biases(model, x)
    assert torch.equal(packed[0].bias, dense[0].bias)
    assert not torch.equal(packed[0].bias, initial)
    with lorafast.disable_adapter(packed):
        torch.testing.assert_close(packed(x), nn.functional.linear(x, linear.weight, initial))
        assert torch.equal(packed[0].base_layer.bias, initial)
    assert set(packed.state_dict()) == keys
    assert packed[0].bias.requires_grad
    assert torch.equal(packed[0].bias, dense[0].bias)
    for source, folder in ((dense, "dense"), (packed, "packed")):
        lorafast.save_adapter(source, tmp_path / folder)
        loaded = copy.deepcopy(base)
        lorafast.load_adapter(loaded, tmp_path / folder, trainable=True)
        assert loaded[0].bias.requires_grad
        assert torch.equal(loaded(x), packed(x))
    lorafast.unload(packed)
    assert torch.equal(packed[0].bias, initial)
    assert not packed[0].bias.requires_grad
    assert set(packed.state_dict()) == set(base.state_dict())


@pytest.mark.parametrize("into", ["dequantise", "requantise"])
def test_a_trained_bias_is_merged_and_frozen(into):
    x = torch.randn(20, K)
    model = nn.Sequential(quantised(nn.Linear(K, N)))
    lorafast.adapt(model, lorafast.LoRA(r=4), bias="all")
    train_biases(model, x)
    bias = model[0].bias
    lorafast.merge_quantised(model, into)
    assert torch.equal(model[0].bias, bias)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("make", [quantised, int8])
def test_a_quantised_module_does_not_train_as_a_whole(make):
    head = nn.Sequential(nn.Linear(N, N), make(nn.Linear(N, N)))
    model = nn.Sequential(nn.Linear(K, N), head)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    keys = set(model.state_dict())
    for name in ("1", "1.1"):
        with pytest.raises(ValueError, match=rf"means {name}, but 1\.1 cannot .*bitsandbytes"):
            lorafast.adapt(model, lorafast.LoRA(r=2), ["0"], modules_to_save=[name])
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert set(model.state_dict()) == keys
    lorafast.adapt(model, lorafast.LoRA(r=2), ["0"], modules_to_save=["1.0"])


@pytest.mark.parametrize("make", [quantised, int8])
def test_lisa_refuses_a_block_with_a_quantised_weight(make):
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Sequential(nn.Linear(K, K), nn.ReLU()) for _ in range(3))
    model.layers[1].append(make(nn.Linear(K, K)))
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(ValueError, match=r"layers\.1\.2 cannot train: its weight is bitsandbytes"):
        lorafast.schedule.LISA(model, layers="layers", active=1)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags


def test_int8_that_keeps_its_fp16_weight_trains_as_a_whole():
    head = bnb.nn.Linear8bitLt(N, N, has_fp16_weights=True)
    model = nn.Sequential(nn.Linear(K, N), head)
    lorafast.adapt(model, lorafast.LoRA(r=2), ["0"], modules_to_save=["1"])
    assert head.weight.requires_grad


class Counter:
    """Counts the calls of a module, of which its bound method is a hook."""

    def __init__(self):
        self.calls = 0

    def hook(self, module, inputs, output=None):
        self.calls += 1


@pytest.mark.parametrize("into", ["dequantise", "requantise", None])
@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_hook_of_the_call_fires_once_in_every_call(register, into):
    module, counter, x = quantised(nn.Linear(K, N)), Counter(), torch.randn(20, K)
    handle = getattr(module, register)(counter.hook)
    model = lorafast.adapt(nn.Sequential(module), lorafast.LoRA(r=4))
    model(x)
    assert counter.calls == 1
    with lorafast.disable_adapter(model):
        model(x)
    assert counter.calls == 2
    if into is None:
        lorafast.unload(model)
    else:
        lorafast.merge_quantised(model, into)
    model(x)
    assert counter.calls == 3
    handle.remove()
    model(x)
    assert counter.calls == 3


@pytest.mark.parametrize("adapter", [lorafast.LoRA(r=4), lorafast.DoRA(r=4)], ids=str)
def test_adapt_dequantises_a_layer_twice_and_loading_once(adapter, monkeypatch, tmp_path):
    calls, whole = [], formats.BitsAndBytes4Bit.whole

    def counted(self, out):
        calls.append(self.module)
        return whole(self, out)

    monkeypatch.setattr(formats.BitsAndBytes4Bit, "whole", counted)
    base = nn.Sequential(*(quantised(nn.Linear(64, 64)) for _ in range(3)))
    model = lorafast.adapt(copy.deepcopy(base), adapter)
    # Once for the adapter's bind_layer, once for its start.
    assert len(calls) == 6
    assert {calls.count(layer.base_layer) for layer in model} == {2}
    lorafast.save_adapter(model, tmp_path)
    calls.clear()
    lorafast.load_adapter(base, tmp_path)
    assert len(calls) == 3
