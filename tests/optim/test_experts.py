"""Optimizers of adapters on experts: as on one layer for each expert, or refused in words."""

import pytest
import torch

import lorafast
from lorafast import DoRA, LoRA, optim

E, K, N = 3, 6, 8
OFFSETS = torch.tensor([0, 4, 4, 9], dtype=torch.int32)


def model(adapter, **options):
    """Return a model of one layer of experts, its lora_B away from 0."""
    layer = lorafast.Experts(E, K, N, adapter=adapter, dtype=torch.float64, **options)
    torch.nn.init.normal_(layer.lora_B)
    return torch.nn.ModuleDict({"experts": layer})


def test_lora_fa_steps_each_expert_as_a_layer():
    experts = model(LoRA(r=2, freeze_A=True))
    layer, x = experts["experts"], torch.randn(9, K, dtype=torch.float64)
    singles = torch.nn.ModuleList()
    for e in range(E):
        single = lorafast.Linear(K, N, adapter=layer.adapter, dtype=torch.float64)
        with torch.no_grad():
            single.weight.copy_(layer.weight[e])
            single.bias.copy_(layer.bias[e])
            single.lora_A.copy_(layer.lora_A[e])
            single.lora_B.copy_(layer.lora_B[e])
        singles.append(single)
    optimizers = [optim.LoRAFA(one, lr=0.1) for one in (experts, singles)]
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        layer(x, OFFSETS).square().sum().backward()
        for e, single in enumerate(singles):
            single(x[OFFSETS[e] : OFFSETS[e + 1]]).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
    for e, single in enumerate(singles):
        torch.testing.assert_close(layer.lora_B[e], single.lora_B, rtol=1e-9, atol=1e-9)


def test_lora_plus_takes_magnitudes_and_biases_for_vectors():
    layers = model(DoRA(r=2, lora_bias=True))
    optimizer = optim.LoRAPlus(layers, torch.optim.AdamW, lr=0.1, ratio=16)
    layer = layers["experts"]
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates[id(layer.lora_A)] == 0.1
    for parameter in (layer.lora_B, layer.lora_magnitude, layer.lora_bias):
        assert rates[id(parameter)] == pytest.approx(1.6)


def test_what_has_no_closed_form_is_refused():
    with pytest.raises(ValueError, match=r"experts holds the factors of experts, and LoRA-Pro"):
        optim.LoRAPro(model(LoRA(r=2)), lr=0.1)
    with pytest.raises(ValueError, match=r"lora_B \(8, 2\) is of all experts"):
        optim.LoRAFA(model(LoRA(r=2, freeze_A=True), shared="B"), lr=0.1)
    assert optim.LoRAFA(model(LoRA(r=2, freeze_A=True), shared="A"), lr=0.1)
