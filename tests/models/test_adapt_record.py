"""Layers that another tool replaces or quantises after adapt are noticed and named."""

import copy

import pytest
import torch
from helpers import tiny_transformers
from helpers.foreign_weights import codes
from torch import nn

import lorafast
from lorafast import DoRA, LoRA
from lorafast.models import adapt_record

X = torch.ones(3, 8)


def net():
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


def pruned():
    """Return a model of which one adapted layer has become a plain linear."""
    model = lorafast.adapt(net(), LoRA(r=2))
    model[2] = nn.Linear(8, 4)
    return model


def test_explain_names_a_layer_that_was_replaced():
    told = lorafast.explain(pruned())
    lost = "2: its adapter is gone, a torch.nn.modules.linear.Linear is there now"
    assert told.lost == (lost,)
    assert lost in str(told)
    assert lost in told._repr_html_()
    model = pruned()
    model[0] = nn.Linear(8, 8)
    assert "2: its adapter is gone" in str(lorafast.explain(model))


def test_saving_warns_and_writes_the_rest(tmp_path):
    with pytest.warns(UserWarning, match=r"not in the file: 2 \(a torch\.nn.*Linear is there now"):
        lorafast.save_adapter(pruned(), tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_save_pretrained_warns_too(tmp_path):
    model = lorafast.adapt(tiny_transformers.llama(), LoRA(r=2), ["q_proj"])
    model.model.layers[1].self_attn.q_proj = nn.Linear(32, 32, bias=False)
    with pytest.warns(UserWarning, match=r"not in the file: model\.layers\.1\.self_attn\.q_proj"):
        model.save_pretrained(tmp_path)


@pytest.mark.compile
def test_layers_that_are_wrapped_copied_or_loaded_are_not_lost(tmp_path):
    model = lorafast.adapt(net(), LoRA(r=2))
    assert adapt_record.lost_layers(copy.deepcopy(model)) == {}
    assert adapt_record.lost_layers(torch.compile(model)) == {}
    assert adapt_record.lost_layers(nn.Sequential(model)) == {}
    model[0] = torch.compile(model[0])
    model[2] = nn.Sequential(model[2])
    assert adapt_record.lost_layers(model) == {}
    lorafast.save_adapter(lorafast.adapt(net(), LoRA(r=2)), tmp_path)
    loaded = lorafast.load_adapter(net(), tmp_path)
    assert adapt_record.lost_layers(loaded) == {}
    loaded[0] = nn.Linear(8, 8)
    assert list(adapt_record.lost_layers(nn.Sequential(loaded))) == ["0.0"]


@pytest.mark.parametrize("back", [lorafast.merge, lorafast.unload, lorafast.reference_model])
def test_a_plain_model_has_lost_nothing(back):
    model = back(lorafast.adapt(net(), LoRA(r=2)))
    assert adapt_record.lost_layers(model) == {}
    assert not [key for part in model.modules() for key in vars(part) if key == "_lorafast_layers"]


@pytest.mark.parametrize("adapter", [LoRA(r=2), DoRA(r=2)], ids=repr)
def test_a_weight_quantised_after_adapt_is_refused_in_words(adapter):
    model = lorafast.adapt(net(), adapter)
    model[2].weight = codes(model[2].weight)
    for context in (torch.enable_grad(), torch.no_grad()):
        with context, pytest.raises(TypeError, match=r"weight \(4, 8\) is a .*Codes.*quantised"):
            model(X)
    assert "torch's own operations, because the weight is a " in str(lorafast.explain(model))
