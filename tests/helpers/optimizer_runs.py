"""A small adapted model, its training loop, and the gradient of its dense weight."""

import torch
from torch import nn

import lorafast

WIDE, INNER, NARROW = 7, 11, 5


def model_of(adapter, dtype=torch.float32, bias="none", **options):
    """Return two adapted linears and a head that trains, away from their start."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(WIDE, INNER),
        nn.Tanh(),
        nn.Linear(INNER, NARROW, bias=False),
        nn.Linear(NARROW, 3),
    ).to(dtype)
    lorafast.adapt(model, adapter, ["0", "2"], modules_to_save=["3"], bias=bias, seed=1, **options)
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.lora_B.add_(torch.randn_like(layer.lora_B) * 0.3)
    return model


def loss_of(model, step=0):
    """Return the loss of 16 rows drawn for the step."""
    generator = torch.Generator().manual_seed(100 + step)
    dtype = next(model.parameters()).dtype
    x, target = (
        torch.randn(16, WIDE, generator=generator).to(dtype),
        torch.randn(16, 3, generator=generator).to(dtype),
    )
    return (model(x) - target).square().mean()


def train(model, optimizer, steps, first=0):
    """Make steps of an ordinary loop."""
    for step in range(first, first + steps):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def losses(model, optimizer, steps=30):
    """Return the loss before each step, always of the same rows."""
    found = []
    for _ in range(steps):
        loss = loss_of(model)
        found.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return found


def trained_values(model):
    """Return copies of what trains, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def dense(layer):
    """Return W + sBA [N,K] of a layer, and DoRA's gain [N,1], as leaves of a new graph."""
    with torch.no_grad():
        V = layer.weight + layer.scaling * layer.lora_B @ layer.lora_A
        gain = (
            torch.ones_like(V[:, :1])
            if layer.magnitude is None
            else (layer.magnitude / V.norm(dim=1))[:, None]
        )
    return V.requires_grad_(), gain


def dense_gradient(layer, x, target):
    """Return dL/d(W + sBA) of L = Σ(y - target)², with the gain held."""
    V, gain = dense(layer)
    (x @ (gain * V).t() - target).square().sum().backward()
    return V.grad


def projections(A, B):
    """On B's columns and on A's rows, by a road of its own."""
    return B @ torch.linalg.pinv(B, rtol=1e-7), torch.linalg.pinv(A, rtol=1e-7) @ A
