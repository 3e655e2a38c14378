"""Families of transformers under "all-linear": every adapter trains, files and PEFT agree."""

import re
import warnings

import peft
import pytest
import torch
from helpers import tiny_transformers
from helpers.model_families import FAMILIES
from torch import nn

import lorafast
from lorafast import DoRA, LoRA
from lorafast.models.module_names import adapter_layers

pytestmark = pytest.mark.peft

ADAPTERS = (LoRA(r=2), DoRA(r=2), LoRA(r=2, rslora=True))
# Falcon adds the output of attention to that of its MLP in place.
OWN = {"falcon": DoRA(r=2, keep="inner")}
QUICK = ("siglip", "zamba2")
CASES = [
    pytest.param(
        FAMILIES[name],
        OWN.get(name, ADAPTERS[i % len(ADAPTERS)]),
        id=name,
        marks=[pytest.mark.slow] * (name not in QUICK),
    )
    for i, name in enumerate(FAMILIES)
]
each = pytest.mark.parametrize(("family", "adapter"), CASES)


def outputs(model, family):
    """The floating tensors of a model's output."""
    found = model(**family.inputs)
    return [t for t in found.values() if isinstance(t, torch.Tensor) and t.is_floating_point()]


def adapted(family, adapter):
    """A model whose adapters are away from their start; what is left out is told."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = tiny_transformers.perturb(lorafast.adapt(family.make(), adapter, seed=1))
    left_out = [w for w in told if "whose weight the model reads without" in str(w.message)]
    assert len(left_out) == (family.read != "-")
    return model


@each
def test_every_adapter_gets_a_gradient_and_trains(family, adapter):
    model = adapted(family, adapter)
    names = list(adapter_layers(model))
    assert not [name for name in names if re.fullmatch(family.read, name)]
    before = [tensor.detach() for tensor in outputs(model, family)]
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    torch.manual_seed(2)
    sum(tensor.square().mean() for tensor in outputs(model, family)).backward()
    without = lorafast.adapters_without_gradient(model)
    assert without == [name for name in names if re.fullmatch(family.idle, name)]
    trained = [layer for name, layer in adapter_layers(model).items() if name not in without]
    assert all(layer.lora_A.grad.any() and layer.lora_B.grad.any() for layer in trained)
    torch.optim.SGD(lorafast.adapter_parameters(model), lr=1e-2).step()
    model.eval()
    assert any(
        not torch.equal(after, first)
        for after, first in zip(outputs(model, family), before, strict=True)
    )


@each
@torch.no_grad()
def test_a_file_gives_the_same_outputs_here_and_in_peft(family, adapter, tmp_path):
    model = adapted(family, adapter)
    want = outputs(model, family)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        lorafast.save_adapter(model, tmp_path)
    loaded = lorafast.load_adapter(family.make(), tmp_path)
    assert all(map(torch.equal, outputs(loaded, family), want))
    warned = any("PEFT may take these layers" in str(warning.message) for warning in told)
    assert warned is (family.peft in ("others", "same, warned"))
    if family.peft.startswith("same"):
        theirs = tiny_transformers.loaded_by_peft(family.make(), tmp_path)
        torch.testing.assert_close(outputs(theirs, family), want)


@each
def test_all_linear_takes_what_it_takes_in_peft(family, adapter):
    config = peft.LoraConfig(r=2, target_modules="all-linear")
    if family.peft == "refuses":
        with pytest.raises(ValueError, match="incompatible with Mamba"):
            peft.get_peft_model(family.make(), config)
        return
    ours = set(adapter_layers(adapted(family, adapter)))
    theirs = set(peft.get_peft_model(family.make(), config).base_model.targeted_module_names)
    read = {name for name in theirs if re.fullmatch(family.read, name)}
    assert bool(read) is (family.read != "-")
    if family.peft.startswith("same"):
        assert ours == theirs - read
    else:
        assert ours > theirs


@each
def test_merged_it_gives_the_same_outputs(family, adapter):
    model = adapted(family, adapter)
    with torch.no_grad():
        want = outputs(model, family)
        found = outputs(lorafast.merge(model), family)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
