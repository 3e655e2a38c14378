"""A small net of odd shapes, its gradients and its weights, for starts that follow a gradient."""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import lorafast

K, N, R = 11, 13, 3
X = torch.randn(40, K, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Odd shapes, one linear each way and a Conv1D."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.mixed = nn.Linear(K, N), nn.Linear(N, K, bias=False), Conv1D(9, K)

    def forward(self, x):
        return self.mixed(torch.tanh(self.down(torch.tanh(self.up(x)))))


def net(dtype=torch.float64):
    """Return the net, always the same."""
    torch.manual_seed(0)
    model = Net()
    nn.init.normal_(model.mixed.weight)
    return model.to(dtype)


def loss_of(model, x):
    """Return the net's loss for x."""
    return (model(x) - 1).square().mean()


def gradients_of(model, **options):
    """Return the gradients that lorafast.estimate_gradients finds."""
    return lorafast.estimate_gradients(model, [X.to(model.up.weight.dtype)], loss_of, **options)


def matrices(model):
    """Return every layer's weight as [N,K], by name."""
    return {
        name: (one.weight.t() if isinstance(one, Conv1D) else one.weight).detach().clone()
        for name, one in model.named_children()
    }


def perturbed(model):
    """Return the model with everything that trains moved."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(
                    0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                )
    return model
