"""A default device that torch was given is that of new tensors, and no matter to adapted layers."""

import pytest
import torch
from torch import nn

import lorafast
from lorafast import AdaLoRA, AFLoRA, DoRA, LaMDA, LoRA, PiSSA, VeRA, schedule

ADAPTERS = [
    LoRA(r=2, dropout=0.3),
    LoRA(r=2, init=PiSSA()),
    DoRA(r=2),
    DoRA(r=2, axis="in", dropout=0.3),
    LaMDA(r=2),
    VeRA(r=4),
    AdaLoRA(r=3, target_r=2),
    AFLoRA(r=2),
]
SCHEDULES = {LaMDA: schedule.LaMDAFreeze, AdaLoRA: schedule.AdaLoRA, AFLoRA: schedule.AFLoRA}
X = torch.arange(128.0 * 8).reshape(128, 8) / 1024


def net():
    torch.manual_seed(0)
    with torch.device("cpu"):
        return nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4))


def train(model):
    torch.manual_seed(3)
    optimizer = torch.optim.SGD(lorafast.adapter_parameters(model), lr=0.1)
    kind = SCHEDULES.get(type(model[0].adapter))
    planned = kind and kind(model, total_steps=6)
    for _ in range(3):
        model(X).square().mean().backward()
        optimizer.step()
        if planned:
            planned.step()
        optimizer.zero_grad()


def everything(adapter, folder):
    """The outputs of a model that is adapted, trained, saved, loaded, disabled and merged."""
    model = lorafast.adapt(net(), adapter, seed=1)
    train(model)
    outputs = [model.eval()(X), model(X[:2])]
    lorafast.save_adapter(model, folder)
    outputs.append(lorafast.load_adapter(net(), folder).eval()(X))
    with lorafast.disable_adapter(model):
        outputs.append(model(X))
    outputs.append(lorafast.merge(model)(X))
    return [output.detach() for output in outputs]


@pytest.mark.parametrize("adapter", ADAPTERS, ids=repr)
def test_another_default_device_changes_nothing(adapter, tmp_path):
    want = everything(adapter, tmp_path / "a")
    with torch.device("meta"):
        found = everything(adapter, tmp_path / "b")
    assert {output.device.type for output in found} == {"cpu"}
    # A layer's few tokens go another way under a mode, with other roundings.
    torch.testing.assert_close(found, want)
    assert not torch.equal(found[0], found[3])
