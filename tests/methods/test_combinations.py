"""Every adapter with every optimizer and its schedule trains, or is refused in words."""

import copy
import itertools

import pytest
import torch
from helpers.optimizer_runs import INNER, WIDE, loss_of, model_of

import lorafast
from lorafast import AdaLoRA, AFLoRA, DoRA, LaMDA, LoRA, LoRAGA, PiSSA, VeRA, optim, schedule

LR, STEPS = 1e-2, 4
GRADIENTS = {"0": torch.randn(INNER, WIDE), "2": torch.randn(5, INNER)}
GA = LoRAGA(GRADIENTS, gamma=64)
ADAPTERS = {
    "lora": LoRA(r=2),
    "rslora": LoRA(r=2, rslora=True),
    "pissa": LoRA(r=2, init=PiSSA()),
    "lora-ga": LoRA(r=2, init=GA),
    "dora on pissa": DoRA(r=2, init=PiSSA()),
    "exact dora on lora-ga": DoRA(r=2, init=GA, detach_norm=False),
    "dora by column": DoRA(r=2, axis="in"),
    "frozen A": LoRA(r=2, freeze_A=True),
    "dora with frozen A": DoRA(r=2, freeze_A=True, init=PiSSA()),
    "magnitude": DoRA(magnitude_only=True),
    "lamda": LaMDA(r=2),
    "vera": VeRA(r=3),
    "adalora": AdaLoRA(r=3, target_r=2),
    "aflora": AFLoRA(r=2),
}
OPTIMIZERS = {
    "adamw": lambda model: torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], LR
    ),
    "lora+": lambda model: optim.LoRAPlus(model, torch.optim.SGD, lr=LR, ratio=4, momentum=0.9),
    "lora-fa": lambda model: optim.LoRAFA(model, LR),
    "lora-pro": lambda model: optim.LoRAPro(model, LR),
    "lora-pro sgd": lambda model: optim.LoRAPro(model, LR, variant="sgd"),
}
CORES = ("lamda", "vera", "adalora", "aflora")
FROZEN = ("frozen A", "dora with frozen A")
# The optimizer's word for what it cannot serve.
REFUSED = {
    **{
        ("lora-fa", name): "lora_A"
        for name in ADAPTERS
        if name not in (*CORES, *FROZEN, "magnitude")
    },
    **{("lora-fa", name): "core|out_scale|lora_A" for name in CORES},
    **{("lora-pro", name): "lora_A" for name in FROZEN},
    **{("lora-pro", name): "core|out_scale" for name in CORES},
}
SCHEDULES = {
    "lamda": lambda model: schedule.LaMDAFreeze(model, STEPS, fraction=1.0),
    "adalora": lambda model: schedule.AdaLoRA(model, STEPS),
    "aflora": lambda model: schedule.AFLoRA(model, STEPS, warmup=1, final=1, deltaT=1),
}


@pytest.mark.parametrize(("optimizer", "adapter"), list(itertools.product(OPTIMIZERS, ADAPTERS)))
def test_every_pair_trains_or_says_why_not(optimizer, adapter):
    model = model_of(ADAPTERS[adapter])
    before = copy.deepcopy(model.state_dict())
    why = REFUSED.get((optimizer.removesuffix(" sgd"), adapter))
    if why:
        with pytest.raises(ValueError, match=why):
            OPTIMIZERS[optimizer](model)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        return
    made = OPTIMIZERS[optimizer](model)
    planned = SCHEDULES.get(adapter, lambda _: None)(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    first = loss_of(model).item()
    for _ in range(STEPS):
        loss = loss_of(model)
        (loss + planned.penalty() if hasattr(planned, "penalty") else loss).backward()
        made.step()
        if planned:
            planned.step()
        made.zero_grad()
    assert loss_of(model).item() < first
    # Where a part of B was frozen, or E masked, at once, nothing of it need have moved.
    moved = {
        name for name, value in model.state_dict().items() if not torch.equal(value, before[name])
    }
    assert moved <= trained
    assert trained - moved <= ({f"{i}.lora_B" for i in "02"} if planned else set())


def test_ranks_by_spectrum_serve_any_adapter_that_has_one():
    for adapter in (
        LoRA(r=2),
        DoRA(r=2, init=PiSSA()),
        LaMDA(r=2),
        AFLoRA(r=2),
        AdaLoRA(r=4, target_r=1),
    ):
        model = torch.nn.Sequential(torch.nn.Linear(WIDE, INNER), torch.nn.Linear(INNER, 5))
        ranks = lorafast.spectral_ranks(model, (1, 3), budget=2)
        lorafast.adapt(model, adapter, rank_pattern=ranks)
        assert sorted(layer.r for layer in model) == [1, 3]
