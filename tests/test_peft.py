"""Where the ops cannot serve a PEFT layer, PEFT's own forward runs, and the reason is told."""

import pytest
import torch
from pefted import N, X, assert_same, config, outcome, shake, wrapped
from torch import nn

import lorafast
from lorafast.models import peft as ours


def hooked(model):
    model.base_model.model.up.base_layer.register_forward_hook(lambda *_: None)


def hooked_factor(model):
    model.base_model.model.up.lora_B["default"].register_forward_pre_hook(lambda *_: None)


def offloaded(model):
    base = model.base_model.model.up.base_layer
    base.forward = base.forward


def trained(model):
    model.base_model.model.up.base_layer.weight.requires_grad_(True)


def own_base(model):
    class Mine(nn.Linear):
        pass

    model.base_model.model.up.base_layer.__class__ = Mine


def own_factor(model):
    class FSDPLinear(nn.Linear):
        pass

    model.base_model.model.up.lora_A["default"].__class__ = FSDPLinear


def tensor_subclass(model):
    up = model.base_model.model.up.base_layer

    class Quantised(nn.Parameter):
        pass

    up.weight = Quantised(up.weight.detach(), requires_grad=False)


def biased_dora(model):
    up = model.base_model.model.up
    up.lora_variant["default"] = ours.DoraLinearVariant()
    up.lora_variant["default"].init(up, "default")
    up.lora_B["default"].bias = nn.Parameter(torch.ones(N))


def own_dropout(model):
    model.base_model.model.up.lora_dropout["default"] = nn.AlphaDropout(0.0)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (hooked, "its base layer has hooks"),
        (hooked_factor, "a part of its adapter has hooks"),
        (offloaded, "its base layer has a forward of its own (offloading?)"),
        (trained, "the weight of its base layer trains"),
        (own_base, "own_base.<locals>.Mine"),
        (own_factor, "own_factor.<locals>.FSDPLinear and a torch.nn.modules.linear.Linear"),
        (tensor_subclass, "tensor_subclass.<locals>.Quantised"),
        (biased_dora, "DoRA with lora_bias, which PEFT counts into the norm"),
        (own_dropout, "its dropout is a torch.nn.modules.dropout.AlphaDropout"),
    ],
)
def test_layers_that_cannot_be_served_step_aside_with_a_reason(spoil, why, calls):
    model = wrapped()
    spoil(model)
    want = outcome(model, X)
    with pytest.warns(UserWarning, match="accelerate: 1 of 2 PEFT layers run on lorafast; left 1: ") as told:
        report = lorafast.accelerate(model)
    assert len(told) == 1
    assert report.taken == ("base_model.model.down",)
    ((name, reason),) = report.left.items()
    assert name == "base_model.model.up"
    assert why in reason
    assert_same(outcome(model, X), want)
    assert (calls["fast"], calls["why"]) == (1, [reason])
    assert "PEFT's own forward: " in str(lorafast.explain(model))


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"lora_dropout": 1e-6}, "its dropout of 1e-06 is nothing or all in 16 bits"),
        ({"init_lora_weights": "mica"}, "its variant is peft.tuners.lora.variants.MiCALinearVariant"),
    ],
    ids=str,
)
def test_adapters_that_cannot_be_served_refuse_the_whole_and_change_nothing(fields, why):
    model = wrapped(targets=["up"], **fields)
    with pytest.raises(ValueError, match=f"model: nothing to accelerate: left 1: {why}"):
        lorafast.accelerate(model)
    assert not [m for m in model.modules() if isinstance(m, ours.Linear | ours.LoraModel)]


def test_a_mixture_with_dora_is_pefts(calls):
    model = wrapped()
    model.add_adapter("other", config(use_dora=True))
    model.base_model.set_adapter(["default", "other"])
    shake(model)
    want = outcome(model, X)
    model.base_model.set_adapter(["default"])
    lorafast.accelerate(model)
    model.base_model.set_adapter(["default", "other"])
    assert_same(outcome(model, X), want)
    assert calls["why"] == ["several active adapters of which one is DoRA"] * 2


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda layer: layer(X.double()), "x and its base layer have different dtypes"),
        (lambda layer: layer(X[..., :-1]), "x does not end in the layer's in_features"),
        (lambda layer: layer(X.long()), "x is no floating activation"),
    ],
)
def test_a_wrong_x_raises_as_pefts_does(call, why, calls):
    model = wrapped()
    layer = model.base_model.model.up
    with pytest.raises(RuntimeError) as want:
        call(layer)
    lorafast.accelerate(model)
    with pytest.raises(RuntimeError) as found:
        call(layer)
    assert str(found.value) == str(want.value)
    assert calls["why"] == [why]


def test_transforms_of_torch_are_pefts(calls):
    model = wrapped(targets=["up"])
    lorafast.accelerate(model)
    layer = model.base_model.model.up
    torch.testing.assert_close(torch.func.vmap(layer)(X), layer(X))
    torch.func.jvp(layer, (X,), (X,))
    assert calls["why"] == ["torch.func or forward-mode AD is at work"] * 2
