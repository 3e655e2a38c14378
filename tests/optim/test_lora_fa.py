"""LoRA-FA: the least-squares gradient, steps like PEFT's optimizer's, and one inverse."""

import copy

import pytest
import torch
from helpers.optimizer_runs import (
    WIDE,
    dense_gradient,
    loss_of,
    model_of,
    train,
    trained_values,
)
from torch import nn

import lorafast
from lorafast import DoRA, LaMDA, LoRA, PiSSA, VeRA
from lorafast.optim import LoRAFA

FROZEN = LoRA(r=3, alpha=5, freeze_A=True)
ADAPTERS = [
    FROZEN,
    LoRA(r=3, freeze_A=True, init="gaussian", rslora=True),
    LoRA(r=3, freeze_A=True, init=PiSSA()),
    DoRA(r=3, alpha=7, freeze_A=True),
    DoRA(r=3, freeze_A=True, axis="in"),
]


def corrected(optimizer, B):
    """The gradient AdamW saw at its first step."""
    return optimizer.state[B]["exp_avg"] / (1 - optimizer.param_groups[0]["betas"][0])


def stepped(layer, x, target, **settings):
    optimizer = LoRAFA(layer, lr=0.0, **settings)
    optimizer.zero_grad()
    (layer(x) - target).square().sum().backward()
    optimizer.step()
    return corrected(optimizer, layer.lora_B)


def layer_of(adapter, N=9, K=7, dtype=torch.float64):
    layer = lorafast.Linear(K, N, bias=False, adapter=adapter, dtype=dtype)
    with torch.no_grad():
        layer.lora_B.add_(torch.randn_like(layer.lora_B) * 0.3)
    return layer


@pytest.mark.parametrize("scaling", [None, 0.3, torch.tensor([2.5], dtype=torch.float64)], ids=str)
@pytest.mark.parametrize("adapter", [a for a in ADAPTERS if a.axis == "out"], ids=repr)
def test_the_gradient_is_the_argmin(adapter, scaling):
    layer = layer_of(adapter)
    if scaling is not None:
        layer.scaling = scaling
    x, target = torch.randn(12, 7, dtype=torch.float64), torch.randn(12, 9, dtype=torch.float64)
    G = dense_gradient(layer, x, target)
    best = torch.linalg.lstsq((layer.scaling * layer.lora_A).t(), G.t()).solution.t()
    found = stepped(layer, x, target, ridge=0.0)
    torch.testing.assert_close(found, best, rtol=1e-9, atol=1e-11)
    # The default ridge moves it by 1e-8 of the smallest eigenvalue of AAᵀ.
    torch.testing.assert_close(stepped(layer, x, target), best, rtol=1e-5, atol=1e-7)


def test_more_rank_than_columns_still_leaves_the_least_residual():
    layer = layer_of(LoRA(r=6, freeze_A=True), N=5, K=4)
    x, target = torch.randn(8, 4, dtype=torch.float64), torch.randn(8, 5, dtype=torch.float64)
    G = dense_gradient(layer, x, target)
    found = stepped(layer, x, target, ridge=0.0)
    torch.testing.assert_close(layer.scaling * found @ layer.lora_A, G)


def test_a_scaling_of_zero_moves_nothing():
    for scaling in (0, torch.zeros(())):
        layer = layer_of(FROZEN, dtype=torch.float32)
        layer.scaling = scaling
        assert not stepped(layer, torch.randn(4, 7), torch.randn(4, 9)).any()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 4)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


@pytest.mark.peft
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_steps_are_pefts(monkeypatch, rslora, weight_decay):
    import peft
    from peft.optimizers import lorafa

    torch.manual_seed(0)
    net = Net()
    config = {
        "r": 3,
        "lora_alpha": 6,
        "target_modules": ["up", "down"],
        "use_rslora": rslora,
        "rank_pattern": {"down": 2},
    }
    theirs = peft.get_peft_model(copy.deepcopy(net), peft.LoraConfig(**config))
    ours = lorafast.adapt(
        net,
        LoRA(r=3, alpha=6, rslora=rslora, freeze_A=True),
        ["up", "down"],
        rank_pattern={"down": 2},
    )
    held = {
        name.replace("base_model.model.", "").replace(".default.weight", ""): p
        for name, p in theirs.named_parameters()
    }
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "lora_" in name:
                parameter.copy_(held[name])
    # PEFT multiplies in bf16 where the machine knows it, which no other run could be compared with
    # to more than two digits.
    monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)
    made = lorafa.create_lorafa_optimizer(
        theirs, r=3, lora_alpha=6, lr=1e-3, weight_decay=weight_decay
    )
    optimizer = LoRAFA(ours, lr=1e-3, weight_decay=weight_decay)
    x = torch.randn(8, 6)
    for _ in range(5):
        for model, one in ((theirs, made), (ours, optimizer)):
            model(x).square().mean().backward()
            one.step()
            one.zero_grad()
    for name, parameter in ours.named_parameters():
        if "lora_" in name:
            torch.testing.assert_close(parameter, held[name], rtol=2e-5, atol=2e-6)


def test_the_inverse_is_made_once_and_anew_for_another_A(monkeypatch):
    calls = []
    pinv = torch.linalg.pinv
    monkeypatch.setattr(
        torch.linalg, "pinv", lambda *args, **kwargs: calls.append(args) or pinv(*args, **kwargs)
    )
    model = model_of(FROZEN)
    optimizer = LoRAFA(model, lr=1e-3)
    train(model, optimizer, 4)
    assert len(calls) == 2
    with torch.no_grad():
        model[0].lora_A.mul_(2)
    train(model, optimizer, 2)
    assert len(calls) == 3
    model[2].lora_A.data = model[2].lora_A.data.clone()
    train(model, optimizer, 2)
    assert len(calls) == 4
    optimizer.load_state_dict(optimizer.state_dict())
    train(model, optimizer, 2)
    assert len(calls) == 6


def test_all_else_is_torchs_adamw_and_gradients_stay():
    model = model_of(DoRA(r=3, freeze_A=True), bias="all")
    twin = copy.deepcopy(model)
    optimizer = LoRAFA(model, lr=1e-2, weight_decay=0.1)
    theirs = torch.optim.AdamW(
        [p for p in twin.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1, eps=1e-6
    )
    for one, adamw in ((model, optimizer), (twin, theirs)):
        loss_of(one).backward()
        adamw.step()
    for (name, ours), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        if ours.requires_grad:
            assert torch.equal(ours.grad, other.grad)
            assert torch.equal(ours, other) == ("lora_B" not in name)
    assert [group["name"] for group in optimizer.param_groups] == ["factors", "other"]
    assert {"0.bias", "0.lora_magnitude", "3.weight"} < trained_values(model).keys()


def test_every_form_steps_alike():
    found = []
    for settings in ({"foreach": False}, {"foreach": True}, {"fused": True}):
        model = model_of(FROZEN)
        found.append(trained_values(train(model, LoRAFA(model, lr=1e-2, **settings), 3)))
    for other in found[1:]:
        for name, value in found[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_schedulers_and_scalers(fused):
    plain, scaled = model_of(FROZEN), model_of(FROZEN)
    for model, scaler in ((plain, None), (scaled, torch.amp.GradScaler("cpu", init_scale=256.0))):
        optimizer = LoRAFA(model, lr=1e-2, fused=fused)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        for step in range(3):
            loss = loss_of(model, step)
            (loss if scaler is None else scaler.scale(loss)).backward()
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
            schedule.step()
            optimizer.zero_grad()
        assert optimizer.param_groups[0]["lr"] == 1e-2 / 8
    for name, value in trained_values(plain).items():
        torch.testing.assert_close(trained_values(scaled)[name], value, rtol=1e-5, atol=1e-6)


def test_a_layer_that_starts_later_starts_as_if_it_were_the_first():
    model, fresh = model_of(FROZEN), model_of(FROZEN)
    optimizer = LoRAFA(model, lr=1e-2, eps=1e-3)
    loss_of(model).backward()
    model[2].lora_B.grad = None
    optimizer.step()
    model[2].lora_B.grad = torch.ones_like(model[2].lora_B) * 1e-3
    optimizer.step()
    fresh[2].lora_B.grad = torch.ones_like(model[2].lora_B) * 1e-3
    LoRAFA(fresh, lr=1e-2, eps=1e-3).step()
    assert torch.equal(model[2].lora_B, fresh[2].lora_B)
    assert not torch.equal(model[0].lora_B, fresh[0].lora_B)


def test_groups_have_their_own_rates_and_more_can_come():
    model = model_of(FROZEN)
    optimizer = LoRAFA(model, lr=1e-2)
    optimizer.param_groups[0]["lr"] = 0.0
    extra = nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [extra], "lr": 0.5})
    extra.sum().backward()
    before = trained_values(model)
    train(model, optimizer, 1)
    changed = {
        name
        for name, value in trained_values(model).items()
        if not torch.equal(value, before[name])
    }
    assert changed == {"3.weight", "3.bias"}
    torch.testing.assert_close(extra.detach(), torch.full((2,), 0.5))


def test_a_pair_that_rested_is_corrected_once_it_is_added():
    model = model_of(FROZEN)
    model[2].lora_B.requires_grad_(False)
    optimizer = LoRAFA(model, lr=0.0)
    model[2].lora_B.requires_grad_(True)
    optimizer.add_param_group({"params": [model[2].lora_B]})
    loss_of(model).backward()
    optimizer.step()
    A, s = model[2].lora_A, model[2].scaling
    want = model[2].lora_B.grad @ torch.linalg.inv(A @ A.t()) / s**2
    torch.testing.assert_close(corrected(optimizer, model[2].lora_B), want, rtol=1e-4, atol=1e-5)


def test_what_has_no_gradient_rests_and_closures_and_copies_work():
    model = model_of(FROZEN)
    optimizer = LoRAFA(model, lr=1e-2)
    before = trained_values(model)
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in trained_values(model).items())

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    first = optimizer.step(closure)
    optimizer.zero_grad()
    again, other = copy.deepcopy((model, optimizer))
    train(model, optimizer, 2)
    train(again, other, 2)
    assert all(
        torch.equal(value, trained_values(again)[name])
        for name, value in trained_values(model).items()
    )
    assert loss_of(model) < first


def test_half_precision_factors():
    model = model_of(FROZEN, dtype=torch.bfloat16, adapter_dtype=torch.bfloat16)
    train(model, LoRAFA(model, lr=1e-2), 2)
    assert model[0].lora_B.dtype == torch.bfloat16
    assert model[0].lora_B.isfinite().all()


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (LoRA(r=3), r"0\.lora_A \(3, 7\) trains.*freeze_A=True"),
        (DoRA(r=3), r"freeze_A=True"),
        (LaMDA(r=3), r"0: LaMDA\(r=3, alpha=8\) has lora_core \(3, 3\)"),
        (VeRA(r=3), r"lora_core \(3,\)"),
    ],
)
def test_refusals(adapter, message):
    with pytest.raises(ValueError, match=message):
        LoRAFA(model_of(adapter), lr=1e-3)


def test_more_refusals():
    with pytest.raises(ValueError, match="no adapted layer"):
        LoRAFA(nn.Linear(3, 3), lr=1e-3)
    with pytest.raises(ValueError, match="no parameter that trains"):
        LoRAFA(model_of(FROZEN).requires_grad_(False), lr=1e-3)
    for wrong, message in (
        ({"lr": -1.0}, "learning rate"),
        ({"lr": 1e-3, "ridge": -1.0}, r"ridge=-1\.0"),
    ):
        with pytest.raises(ValueError, match=message):
            LoRAFA(model_of(FROZEN), **wrong)
    model = model_of(FROZEN)
    nn.utils.parametrize.register_parametrization(model[0], "lora_B", nn.Tanh())
    with pytest.raises(ValueError, match=r"0\.lora_B \(11, 3\) is parametrized"):
        LoRAFA(model, lr=1e-3)


def test_an_A_that_trains_is_refused_later_too():
    model = model_of(FROZEN)
    optimizer = LoRAFA(model, lr=1e-3)
    model[0].lora_A.requires_grad_(True)
    with pytest.raises(ValueError, match=rf"lora_A \(3, {WIDE}\) trains"):
        optimizer.add_param_group({"params": [model[0].lora_A]})
    assert len(optimizer.param_groups) == 2
