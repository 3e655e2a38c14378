"""A small model and its adapter on disk, for the tests of what is written and read."""

import traceback

import torch
from torch import nn

import lorafast

K, N = 6, 5


def net():
    """Return a small net of three linears, always the same."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(K, N), nn.Tanh(), nn.Linear(N, K, bias=False), nn.Linear(K, K))


def adapted_net(adapter, seed=3, **options):
    """Return the net with an adapter away from its start."""
    model = lorafast.adapt(net(), adapter, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


X = torch.randn(4, K, generator=torch.Generator().manual_seed(1))


def is_unchanged(model, before, modules):
    """True if the model has the modules and the state it had."""
    assert list(model.modules()) == modules
    state = model.state_dict()
    assert state.keys() == before.keys()
    return all(torch.equal(state[name], value) for name, value in before.items())


def raised_on_purpose(error):
    """True if an error was raised on purpose, not by an operation that met the unexpected."""
    return traceback.extract_tb(error.__traceback__)[-1].line.startswith("raise ")
