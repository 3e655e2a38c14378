"""Adapters exported as plain LoRA: exact at full rank, with the error printed below it."""

import copy

import pytest
import torch
from helpers import tiny_transformers
from helpers.whole_models import assert_close, each_adapter
from torch import nn

import lorafast
from lorafast import DoRA, LaMDA, LoRA, VeRA


@pytest.mark.peft
@each_adapter("gpt2", "llama")
def test_exported_as_plain_lora(adapter, dtype, kind, tmp_path, capsys):
    def make():
        return tiny_transformers.KINDS[kind]().to(dtype)

    model = tiny_transformers.adapted(
        make(), adapter, rank_pattern={} if isinstance(adapter, VeRA) else {r".*\b0\..*": 3}
    )
    want = tiny_transformers.outputs(model)
    if isinstance(adapter, DoRA):
        with pytest.raises(ValueError, match=r"has no low rank.*rank="):
            lorafast.save_adapter(model, tmp_path, as_lora=True)
    lorafast.save_adapter(model, tmp_path, as_lora=True, rank=48)  # no layer has more
    told = capsys.readouterr().out
    assert "as plain LoRA of rank" in told
    assert float(told.split("at most ")[1].split()[0]) < 1e-5
    loaded = lorafast.load_adapter(make(), tmp_path)
    for one in (loaded, tiny_transformers.loaded_by_peft(make(), tmp_path)):
        assert_close(tiny_transformers.outputs(one), want, dtype, 4)
    layers = [m for m in loaded.modules() if isinstance(m, lorafast.nn.linear.AdapterLinearBase)]
    assert {(type(layer.adapter), layer.scaling) for layer in layers} == {(LoRA, 1.0)}


@pytest.mark.parametrize(
    "adapter", [LoRA(r=4), DoRA(r=4), VeRA(r=8), DoRA(r=4, axis="in"), LaMDA(r=4)], ids=repr
)
def test_the_printed_truncation_error_is_the_true_one(adapter, tmp_path, capsys):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(20, 16))
    weight = base[0].weight.detach().clone().double()
    model = tiny_transformers.adapted(base, adapter)
    layer = copy.deepcopy(model[0]).double()
    layer.merge(keep=True)
    delta = layer.weight.detach() - weight
    errors = []
    for rank in (1, 2, 3):
        lorafast.save_adapter(model, tmp_path, as_lora=True, rank=rank)
        told = float(capsys.readouterr().out.split("at most ")[1].split()[0])
        loaded = lorafast.load_adapter(nn.Sequential(nn.Linear(20, 16)), tmp_path)[0]
        left = delta - (loaded.lora_B @ loaded.lora_A).double() * loaded.scaling
        best = torch.linalg.svdvals(delta)[rank:].norm() / delta.norm()
        assert told == pytest.approx(float(left.norm() / delta.norm()), rel=0.02)
        assert told == pytest.approx(float(best), rel=0.02)
        errors.append(told)
    assert errors == sorted(errors, reverse=True)
    for wrong in (0, True, 2.5):
        with pytest.raises(ValueError, match=f"rank={wrong!r}"):
            lorafast.save_adapter(model, tmp_path, as_lora=True, rank=wrong)


def test_biases_are_exported(tmp_path, capsys):
    base = nn.Sequential(nn.Linear(6, 5))
    model = tiny_transformers.adapted(copy.deepcopy(base), DoRA(r=2, lora_bias=True))
    lorafast.save_adapter(model, tmp_path, as_lora=True, rank=5)
    x = torch.randn(3, 6)
    torch.testing.assert_close(
        lorafast.load_adapter(copy.deepcopy(base), tmp_path)(x), model(x), rtol=1e-4, atol=1e-5
    )
