"""Layers for tests: one of every kind of adapter, moved away from its start."""

import pytest
import torch

import lorafast
from lorafast import AdaLoRA, AFLoRA, DoRA, LaMDA, LoRA, LoRAGA, PiSSA, VeRA

N, K = 14, 10
G = torch.randn(N, K, generator=torch.Generator().manual_seed(0))
ADAPTERS = [
    LoRA(r=3),
    LoRA(r=3, lora_bias=True),
    LoRA(r=3, freeze_A=True, init="gaussian", rslora=True),
    DoRA(r=3),
    DoRA(r=3, axis="in"),
    DoRA(r=3, lora_bias=True),
    DoRA(r=3, lora_bias=True, axis="in"),
    DoRA(magnitude_only=True),
    DoRA(r=3, dropout_on="both", keep="inner", dropout=0.2),
    LaMDA(r=3),
    LaMDA(r=3, init="zero"),
    LaMDA(r=3, init="repo"),
    LoRA(r=3, alpha=5, init=PiSSA()),
    DoRA(r=3, init=PiSSA(4)),
    LoRA(r=3, alpha=5, init=LoRAGA(G)),
    VeRA(r=3),
    AdaLoRA(r=3, target_r=2),
    AFLoRA(r=3),
]
each_adapter = pytest.mark.parametrize("adapter", ADAPTERS, ids=repr)


def trained_layer(adapter, **settings):
    """Return a layer whose adapter has moved away from its start, in eval."""
    layer = lorafast.Linear(K, N, adapter=adapter, **settings)
    with torch.no_grad():
        for name, part in layer.named_parameters():
            if name.startswith("lora"):
                part.add_(torch.randn_like(part) * 0.2)
    return layer.eval()


def inputs(dtype=torch.float32):
    """Return five tokens."""
    return torch.randn(5, K).to(dtype)
