"""Calls of few tokens of an accelerated LoRA are left to PEFT's own forward, and no others."""

import pytest
import torch
from torch import nn

import lorafast
from lorafast.engine import plain_products
from lorafast.runtime import env

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.peft
K, N = 12, 16
MANY = plain_products.MOST_ELEMENTS // (K + N) + 1
MANY_COPIED = plain_products.MOST_ELEMENTS_COPIED // (K + N) + 1


def layer_of(accelerated=True, dtype=torch.float32, **settings):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False, **settings)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(K, N)).to(dtype), config)
    if accelerated:
        lorafast.accelerate(model)
    return model.base_model.model[0]


def results(layer, x):
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    return [y, x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lora_on_few_tokens_is_pefts_to_the_bit(p, dtype, calls):
    x = torch.randn(2, 3, K).to(dtype)
    ours, theirs = (layer_of(accelerated, dtype, lora_dropout=p) for accelerated in (True, False))
    for one, same in zip(results(ours, x), results(theirs, x), strict=True):
        assert torch.equal(one, same)
    assert calls["fast"] == 0
    assert ["few tokens" in why for why in calls["why"]] == [True]


@pytest.mark.parametrize(
    ("settings", "dtype", "M"),
    [
        ({}, torch.float32, MANY),
        ({"lora_dropout": 0.3}, torch.float32, MANY_COPIED),
        ({}, torch.bfloat16, MANY_COPIED),
        ({"use_dora": True}, torch.float32, 3),
    ],
    ids=["lora", "dropout", "wider factors", "dora"],
)
def test_many_tokens_and_other_methods_run_on_the_op(settings, dtype, M, calls):
    layer_of(dtype=dtype, **settings)(torch.randn(M, K).to(dtype))
    assert calls == {"fast": 1, "why": []}


def test_dropout_in_evaluation_needs_no_copy(calls):
    layer = layer_of(lora_dropout=0.3).eval()
    layer(torch.randn(MANY_COPIED, K))
    assert calls["fast"] == 0


def test_a_forced_backend_is_not_left(calls, monkeypatch):
    monkeypatch.setenv(env.BACKEND.name, "eager")
    layer_of()(torch.randn(3, K))
    assert calls == {"fast": 1, "why": []}


def test_several_adapters_are_left_together(calls):
    config = peft.LoraConfig(r=4, target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(nn.Linear(K, N)), config)
    model.add_adapter("other", config)
    model.base_model.set_adapter(["default", "other"])
    lorafast.accelerate(model)
    model(torch.randn(3, K))
    model(torch.randn(MANY, K))
    assert (calls["fast"], len(calls["why"])) == (1, 1)


def test_explain_tells():
    layer = layer_of()
    (row,) = lorafast.explain(layer, tokens=3).rows
    assert any("3 tokens are few: PEFT's own forward" in note for note in row.notes)
    (row,) = lorafast.explain(layer, tokens=MANY).rows
    assert not any("are few" in note for note in row.notes)
