"""Layers for the tests of the host path, what a step gives, and the comparison of two."""

import pytest
import torch

import lorafast
from lorafast.engine import host


def ready():
    """The function of the C++ module, built and loaded if need be."""
    layer = lorafast.Linear(8, 8)
    layer(torch.randn(2, 8))
    if not host.is_ready():
        pytest.skip("the host path cannot be built here")
    return host.linear


def assert_same_bits(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if value is None:
            assert ours[name] is None, name
        else:
            assert ours[name].dtype == value.dtype, name
            assert torch.equal(ours[name], value), name


def lora(K=16, N=24, adapter=None, **options):
    layer = lorafast.Linear(K, N, adapter=adapter or lorafast.LoRA(r=4, alpha=8, **options))
    torch.nn.init.normal_(layer.lora_B)
    return layer


def step(layer, x):
    """y and all gradients, by name."""
    torch.manual_seed(3)
    layer.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    grads = {name: p.grad for name, p in layer.named_parameters() if p.requires_grad}
    return {"y": y.detach(), "x": x.grad, **grads}


LAYERS = {
    "lora": lambda: lora(),
    "dropout": lambda: lora(dropout=0.3),
    "lamda": lambda: lora(adapter=lorafast.LaMDA(r=4)),
    "vera": lambda: lora(adapter=lorafast.VeRA(r=4)),
    "dora": lambda: lora(adapter=lorafast.DoRA(r=4, dropout=0.2)),
    "dora-exact": lambda: lora(adapter=lorafast.DoRA(r=4, detach_norm=False)),
    "dora-cached": lambda: lora(adapter=lorafast.DoRA(r=4, cache_norm=True)),
}
