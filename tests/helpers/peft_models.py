"""Small models that carry PEFT's adapters, for the tests of what takes them over."""

import peft
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorafast.integrations.peft_lamda import LamdaConfig

K, N = 24, 40


class Net(nn.Module):
    """Two linears and a Conv1D."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.mixed = nn.Linear(K, N), nn.Linear(N, K, bias=False), Conv1D(K, K)

    def forward(self, x):
        return self.mixed(self.down(torch.relu(self.up(x))))


TARGETS = ["up", "down"]
ALL = [*TARGETS, "mixed"]


def config(targets=TARGETS, **fields):
    """Return a LoraConfig for these layers."""
    return peft.LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": list(targets)} | fields))


def lamda_config(targets=TARGETS, **fields):
    """Return a LamdaConfig for these layers."""
    return LamdaConfig(**({"r": 4, "lora_alpha": 8, "target_modules": list(targets)} | fields))


def peft_model(dtype=torch.float32, autocast_adapter_dtype=True, config=config, **fields):
    """Return a PeftModel whose adapters are away from their start."""
    torch.manual_seed(0)
    model = peft.get_peft_model(
        Net().to(dtype), config(**fields), autocast_adapter_dtype=autocast_adapter_dtype
    )
    perturb(model)
    return model


def lamda_model(*args, **fields):
    """Return a PeftModel with LaMDA adapters away from their start."""
    return peft_model(*args, config=lamda_config, **fields)


def perturb(model):
    """Move every adapter tensor."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)


def output_and_gradients(model, x, seed=3):
    """Return y, and all gradients by parameter."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    torch.manual_seed(seed)
    y = model(x)
    y.float().square().mean().backward()
    return {"y": y.detach(), "x": x.grad} | {
        name: p.grad for name, p in model.named_parameters() if p.grad is not None
    }


def assert_same(found, want, rtol=1e-4, atol=1e-5):
    """Assert that two dicts hold the same tensors, to a tolerance."""
    assert found.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(found[name], want[name], rtol=rtol, atol=atol)


X = torch.randn(3, 5, K, generator=torch.Generator().manual_seed(7))


def add_second_adapter(model):
    """Add an adapter "other" away from its start."""
    torch.manual_seed(2)
    model.add_adapter("other", config(r=2, use_rslora=True))
    perturb(model)


def lamda_with_another(**fields):
    """Return a model with a LaMDA adapter and another that the fields describe, in eval."""
    model = lamda_model(targets=ALL, lamda_init="zero")
    torch.manual_seed(2)
    model.add_adapter("other", config(**({"r": 2} | fields)))
    perturb(model)
    return model.eval()
