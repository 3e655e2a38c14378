"""Dropout as tools turn it off and on: by walking the modules of a model."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import lorafast
from lorafast import DoRA, LaMDA, LoRA, VeRA

ADAPTERS = (LoRA, DoRA, LaMDA, VeRA)


def model_of(adapter, p=0.5):
    model = nn.Sequential(nn.Linear(12, 16), Conv1D(8, 16))
    lorafast.adapt(model, adapter(r=4, dropout=p), target_modules=["0", "1"])
    for layer in model:
        # VeRA starts at an out_scale of zero, the others at a B of zero.
        nn.init.normal_(layer.lora_B if layer.lora_out_scale is None else layer.lora_out_scale)
    return model


def is_random(model, x):
    return not torch.equal(model(x), model(x))


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_walking_the_dropout_modules_turns_dropout_off_and_on(adapter):
    model, x = model_of(adapter), torch.randn(64, 12)
    assert is_random(model, x)
    dropouts = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    assert [module.p for module in dropouts] == [0.5, 0.5]
    # As trainers of preferences do for their reference.
    for module in dropouts:
        module.p = 0
    off = model(x)
    assert not is_random(model, x)
    assert torch.equal(off, model.eval()(x))
    # As Monte Carlo dropout does: the model in evaluation, its dropout alone in training.
    for module in dropouts:
        module.p = 0.3
        module.train()
    assert is_random(model, x)
    model.eval()
    assert torch.equal(off, model(x))


def test_the_child_follows_the_layer():
    layer = lorafast.Linear.from_linear(nn.Linear(4, 4).eval(), LoRA(r=2, dropout=0.1))
    assert not layer.lora_dropout.training
    assert layer.train().lora_dropout.training
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert copied.lora_dropout.p == 0.1
    assert not any("dropout" in key for key in layer.state_dict())


def test_no_dropout_is_an_identity_and_nothing_else_is_taken():
    layer, x = lorafast.Linear(4, 4, adapter=LoRA(r=2)), torch.randn(64, 4)
    nn.init.normal_(layer.lora_B)
    assert type(layer.lora_dropout) is nn.Identity
    assert not is_random(layer, x)
    layer.lora_dropout = nn.Dropout(0.5)
    assert is_random(layer, x)
    layer.lora_dropout = nn.AlphaDropout(0.5)
    with pytest.raises(TypeError, match=r"lora_dropout must be an nn.Dropout .*AlphaDropout"):
        layer(x)


def test_explain_shows_what_the_child_says():
    layer = lorafast.Linear(64, 64, adapter=DoRA(r=4, dropout=0.1, dropout_on="both"))
    assert any("second base GEMM" in note for note in lorafast.explain(layer).rows[0].notes)
    layer.lora_dropout.p = 0.0
    assert not any("second base GEMM" in note for note in lorafast.explain(layer).rows[0].notes)


def test_the_argument_has_the_name_it_has_in_the_replaced_layer():
    x, ids = torch.randn(3, 12), torch.tensor([1, 2])
    linear, table = lorafast.Linear(12, 4), lorafast.Embedding(5, 4)
    assert torch.equal(linear(input=x), linear(x))
    assert torch.equal(table(input=ids), table(ids))
    conv = model_of(LoRA, 0.0)[1]
    assert torch.equal(conv(x=torch.ones(2, 16)), conv(torch.ones(2, 16)))
