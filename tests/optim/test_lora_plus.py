"""LoRA+: the learning rate of each parameter, and steps, as PEFT's helper makes them."""

import copy
import sys
import types

import pytest
import torch
from helpers.optimizer_runs import loss_of, model_of
from torch import nn

import lorafast
from lorafast import LaMDA, LoRA, VeRA
from lorafast.optim import LoRAPlus


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.up, self.norm = nn.Embedding(9, 6), nn.Linear(6, 10), nn.LayerNorm(10)
        self.down, self.head = nn.Linear(10, 7), nn.Linear(7, 4)

    def forward(self, ids):
        return self.head(self.down(torch.tanh(self.norm(self.up(self.table(ids))))))


IDS = torch.arange(18).reshape(2, 9) % 9
# What PEFT calls a parameter, and what it is called here.
SPELLED = {
    "base_model.model.": "",
    ".default": "",
    ".modules_to_save": "",
    ".base_layer": "",
    "lora_embedding_": "lora_",
    "lora_B.bias": "lora_bias",
    "lora_A.weight": "lora_A",
    "lora_B.weight": "lora_B",
    "lora_magnitude_vector.weight": "lora_magnitude",
}


def named(model):
    def ours(name):
        for theirs, here in SPELLED.items():
            name = name.replace(theirs, here)
        return name

    return {ours(name): parameter for name, parameter in model.named_parameters()}


def rates(model, optimizer):
    """(lr, weight_decay) by name of what trains."""
    names = {parameter: name for name, parameter in named(model).items()}
    return {
        names[p]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }


def pair(fields, **settings):
    """PEFT's model and ours from one net, with the same values."""
    import peft

    torch.manual_seed(0)
    net = Net()
    theirs = peft.get_peft_model(copy.deepcopy(net), peft.LoraConfig(r=3, lora_alpha=6, **fields))
    ours = lorafast.adapt(net, peft.LoraConfig(r=3, lora_alpha=6, **fields))
    with torch.no_grad():
        here = named(ours)
        for name, parameter in named(theirs).items():
            if "original_module" not in name:
                here[name].copy_(parameter)
    return theirs, ours


CASES = {
    "dora": {
        "use_dora": True,
        "target_modules": ["table", "up", "down"],
        "modules_to_save": ["head", "norm"],
    },
    "biases": {
        "bias": "all",
        "lora_bias": True,
        "target_modules": ["up", "down"],
        "modules_to_save": ["norm"],
    },
}
each_case = pytest.mark.parametrize("fields", CASES.values(), ids=CASES)


@pytest.mark.peft
@each_case
def test_groups_are_pefts(fields):
    from peft.optimizers import create_loraplus_optimizer

    theirs, ours = pair(fields)
    made = create_loraplus_optimizer(
        theirs,
        torch.optim.AdamW,
        lr=1e-3,
        loraplus_lr_ratio=8,
        loraplus_weight_decay=0.1,
        loraplus_lr_embedding=3e-5,
    )
    want = rates(theirs, made)
    settings = {"lr": 1e-3, "ratio": 8, "weight_decay": 0.1, "lr_embedding": 3e-5}
    assert rates(ours, LoRAPlus(ours, torch.optim.AdamW, **settings)) == want
    # PEFT's own model can be given too.
    assert rates(theirs, LoRAPlus(theirs, torch.optim.AdamW, **settings)) == want
    assert want["up.lora_A"] == (1e-3, 0.1)
    assert want["up.lora_B"] == (8e-3, 0.1)


@pytest.mark.peft
@each_case
def test_steps_are_pefts(fields):
    from peft.optimizers import create_loraplus_optimizer

    theirs, ours = pair(fields)
    made = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    optimizer = LoRAPlus(ours, torch.optim.AdamW, lr=1e-3, ratio=16)
    for _ in range(4):
        for model, one in ((theirs, made), (ours, optimizer)):
            model(IDS).square().mean().backward()
            one.step()
            one.zero_grad()
    trained = {name for name, p in named(ours).items() if p.requires_grad}
    for name, parameter in named(theirs).items():
        if name in trained and "original_module" not in name:
            torch.testing.assert_close(named(ours)[name], parameter, rtol=1e-4, atol=1e-5)


def test_defaults():
    model = model_of(LoRA(r=3))
    optimizer = LoRAPlus(model, lr=1e-3)
    assert type(optimizer) is torch.optim.AdamW
    assert {group["name"]: group["lr"] for group in optimizer.param_groups} == {
        "A": 1e-3,
        "B": 1e-3 * 16,
        "B_no_decay": 1e-3 * 16,
    }
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0}


def test_cores_and_vectors():
    model = nn.Sequential(
        lorafast.Linear(6, 8, adapter=LaMDA(r=3)), lorafast.Linear(8, 5, adapter=VeRA(r=3))
    )
    found = rates(model, LoRAPlus(model, torch.optim.SGD, lr=1.0, ratio=4, momentum=0.9))
    want = {"0.lora_B": 4.0, "0.lora_core": 1.0, "1.lora_core": 4.0, "1.lora_out_scale": 4.0}
    assert {name: lr for name, (lr, _) in found.items()} == want


def test_an_embedding_of_any_adapter_has_its_rate():
    model = nn.ModuleDict({"table": lorafast.Embedding(9, 6, adapter=LaMDA(r=2))})
    assert {lr for lr, _ in rates(model, LoRAPlus(model, lr=1e-3)).values()} == {1e-6}


def test_norms_of_any_kind_and_biases_do_not_decay():
    model = nn.Sequential(
        lorafast.Linear(6, 6, adapter=LoRA(r=2, lora_bias=True)), nn.RMSNorm(6), nn.BatchNorm1d(6)
    )
    found = rates(model, LoRAPlus(model, lr=1.0, ratio=2, weight_decay=0.5))
    decays = {name for name, (_, decay) in found.items() if decay}
    assert decays == {"0.lora_A", "0.lora_B"}


def test_schedulers_scalers_and_groups_of_ones_own():
    model = model_of(LoRA(r=3))
    optimizer = LoRAPlus(model, torch.optim.SGD, lr=1e-2)
    optimizer.param_groups[-1]["lr"] = 5e-3
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": 1e-4})
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = model[0].lora_B.detach().clone()
    scaler.scale(loss_of(model)).backward()
    grad = model[0].lora_B.grad / 1024
    scaler.step(optimizer)
    schedule.step()
    torch.testing.assert_close(model[0].lora_B, before - 0.16 * grad)
    assert [group["lr"] for group in optimizer.param_groups] == [5e-3, 0.08, 2.5e-3, 5e-5]


def test_with_columns_that_freeze():
    model = model_of(LaMDA(r=4))
    optimizer, schedule = (
        LoRAPlus(model, lr=1e-2, weight_decay=0.1),
        lorafast.schedule.LaMDAFreeze(model, total_steps=8, fraction=0.5),
    )
    held = {}
    for step in range(6):
        loss_of(model, step).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        for column in range(min(4, step + 1)):
            now = model[0].lora_B[:, column].detach().clone()
            assert torch.equal(held.setdefault(column, now), now)
    assert not model[0].lora_B.requires_grad


def test_eight_bits_leave_embeddings_wide(monkeypatch):
    told = []
    manager = types.SimpleNamespace(register_module_override=lambda *said: told.append(said))
    optim = types.SimpleNamespace(
        GlobalOptimManager=types.SimpleNamespace(get_instance=lambda: manager)
    )
    monkeypatch.setitem(sys.modules, "eight", types.SimpleNamespace(optim=optim))
    eight = type("AdamW8bit", (torch.optim.AdamW,), {"__module__": "eight.optim"})
    model = nn.Sequential(nn.Embedding(4, 6), lorafast.Linear(6, 6, adapter=LoRA(r=2)))
    assert isinstance(LoRAPlus(model, eight, lr=1e-3), eight)
    assert told == [(model[0], "weight", {"optim_bits": 32})]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"optimizer_class": 2e-4}, TypeError, r"optimizer_class must be .* not 0\.0002"),
        ({"ratio": 0}, ValueError, "ratio=0"),
        ({"ratio": float("inf")}, ValueError, "ratio=inf"),
        ({"lr": -1.0}, ValueError, r"lr=-1\.0"),
        ({"lr_embedding": -1.0}, ValueError, "lr_embedding"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay"),
        ({"loraplus_lr_ratio": 16}, TypeError, "spelled ratio"),
        ({"loraplus_weight_decay": 0.1}, TypeError, "spelled weight_decay"),
        ({"momentum": 0.9}, TypeError, "momentum"),
    ],
)
def test_refusals(arguments, error, message):
    with pytest.raises(error, match=message):
        LoRAPlus(model_of(LoRA(r=3)), **arguments)


def test_models_without_anything_to_train():
    with pytest.raises(ValueError, match="no adapted layer"):
        LoRAPlus(nn.Linear(3, 3))
    with pytest.raises(TypeError, match="model must be"):
        LoRAPlus([nn.Linear(3, 3)])
    model = model_of(LoRA(r=3)).requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter that trains"):
        LoRAPlus(model)
    with lorafast.disable_adapter(model), pytest.raises(RuntimeError, match="disabled"):
        LoRAPlus(model)
