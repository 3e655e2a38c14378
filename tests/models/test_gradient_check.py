"""adapters_without_gradient: the layers that a backward pass did not reach are named."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lorafast
from lorafast import AdaLoRA, DoRA, LaMDA, LoRA, VeRA


class Reader(nn.Module):
    """Calls `up` and reads the weight of `down`."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x):
        return F.linear(torch.tanh(self.up(x)), self.down.weight)


@pytest.mark.parametrize(
    "adapter", [LoRA(r=2), DoRA(r=2), LaMDA(r=2), VeRA(r=4), AdaLoRA(r=3, target_r=2)], ids=str
)
def test_a_layer_that_nothing_calls_is_named(adapter):
    model = lorafast.adapt(Reader(), adapter)
    assert lorafast.adapters_without_gradient(model) == ["up", "down"]
    model(torch.randn(3, 6)).square().sum().backward()
    assert lorafast.adapters_without_gradient(model) == ["down"]
    for parameter in model.down.parameters():
        parameter.requires_grad_(False)
    assert lorafast.adapters_without_gradient(model) == []


def test_explain_names_it_after_a_backward_pass_alone():
    model = lorafast.adapt(Reader(), LoRA(r=2))
    assert lorafast.explain(model).unreached == ()
    assert "no gradient" not in str(lorafast.explain(model))
    model(torch.randn(3, 6)).square().sum().backward()
    explanation = lorafast.explain(model)
    assert explanation.unreached == ("down",)
    assert str(explanation).count("no gradient, where others have one: down (") == 1
    assert "no gradient, where others have one: down (" in explanation._repr_html_()
    model.zero_grad()
    assert "no gradient" not in str(lorafast.explain(model))
    model.up(torch.randn(3, 6)).sum().backward()
    model.down(torch.randn(3, 8)).sum().backward()
    assert lorafast.explain(model).unreached == ()


@pytest.mark.compile
def test_wrappers_are_looked_through_and_other_parameters_are_not_named():
    model = lorafast.adapt(Reader(), LoRA(r=2), target_modules=["up"], modules_to_save=["down"])
    compiled = torch.compile(model, backend="eager")
    assert lorafast.adapters_without_gradient(compiled) == ["up"]
    assert lorafast.adapters_without_gradient(Reader()) == []
    with pytest.raises(TypeError, match="model must be a"):
        lorafast.adapters_without_gradient([model])


def test_a_frozen_B_is_no_adapter_without_a_gradient():
    model = lorafast.adapt(Reader(), LaMDA(r=2), target_modules=["up"])
    lorafast.schedule.LaMDAFreeze(model, total_steps=1).step()
    model(torch.randn(3, 6)).square().sum().backward()
    assert lorafast.adapters_without_gradient(model) == []


@pytest.mark.peft
def test_pefts_layers_are_named():
    import peft
    from helpers.peft_models import Net, config

    for prepare in (lambda model: None, lorafast.accelerate):
        model = peft.get_peft_model(Net(), config())
        prepare(model)
        model.base_model.model.up(torch.randn(3, 24)).sum().backward()
        assert lorafast.adapters_without_gradient(model) == ["base_model.model.down"]
