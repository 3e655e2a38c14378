"""LoRA-Pro: steps of layers, with Adam on the full gradient, and what it refuses."""

import copy
import itertools

import pytest
import torch
from helpers.optimizer_runs import (
    dense_gradient,
    loss_of,
    losses,
    model_of,
    projections,
    train,
    trained_values,
)
from torch import nn

import lorafast
from lorafast import DoRA, LaMDA, LoRA, PiSSA, VeRA
from lorafast.optim import LoRAPro
from lorafast.optim.lora_pro_steps import X_CHOICES

each_x = pytest.mark.parametrize("x", X_CHOICES)


def layer_of(adapter, start=0.3):
    layer = lorafast.Linear(7, 9, bias=False, adapter=adapter, dtype=torch.float64)
    with torch.no_grad():
        layer.lora_B.add_(torch.randn_like(layer.lora_B) * start)
    return layer


def run(layer, optimizer, seen, count=5):
    """Steps of a layer; before each, seen(G) with the gradient of W + sBA."""
    for step in range(count):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(12, 7, dtype=torch.float64, generator=generator)
        target = torch.randn(12, 9, dtype=torch.float64, generator=generator)
        seen(dense_gradient(layer, x, target))
        (layer(x) - target).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def nearest_steps(A, B, s, G):
    """g^A and g^B by projections of G and a Kronecker system for X."""
    P_B, _ = projections(A, B)
    step_A = torch.linalg.pinv(s * B, rtol=1e-7) @ G
    step_B = (G - P_B @ G) @ torch.linalg.pinv(s * A, rtol=1e-7)
    I = torch.eye(A.shape[0], dtype=A.dtype)  # noqa: E741
    system = torch.kron(B.t() @ B, I) + torch.kron(I, A @ A.t())
    X = (torch.linalg.pinv(system) @ (step_A @ -A.t()).reshape(-1)).reshape(I.shape)
    return step_A + X @ A, step_B - B @ X


@pytest.mark.parametrize("start", [0.3, 0.0])
@pytest.mark.parametrize(
    "adapter",
    [LoRA(r=3, alpha=5), LoRA(r=2, rslora=True), LoRA(r=3, init=PiSSA()), DoRA(r=3)],
    ids=repr,
)
@pytest.mark.parametrize("variant", ["adamw", "sgd"])
def test_steps_are_those_of_one_who_sees_the_full_gradient(variant, adapter, start):
    layer, (lr, b1, b2, eps, decay) = layer_of(adapter, start), (1e-2, 0.8, 0.95, 1e-8, 0.1)
    optimizer = LoRAPro(layer, lr=lr, variant=variant, betas=(b1, b2), eps=eps, weight_decay=decay)
    A, B = layer.lora_A.detach().clone(), layer.lora_B.detach().clone()
    m = v = torch.zeros_like(layer.weight)
    step = 0

    def seen(G):
        nonlocal A, B, m, v, step
        torch.testing.assert_close(layer.lora_A.detach(), A, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(layer.lora_B.detach(), B, rtol=1e-7, atol=1e-9)
        A, B, step = layer.lora_A.detach().clone(), layer.lora_B.detach().clone(), step + 1
        if variant == "adamw":
            P_B, P_A = projections(A, B)
            g = P_B @ G + G @ P_A - P_B @ G @ P_A
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
            G = m / (1 - b1**step) / ((v / (1 - b2**step)).sqrt() + eps)
        step_A, step_B = nearest_steps(A, B, layer.scaling, G)
        A, B = A * (1 - lr * decay) - lr * step_A, B * (1 - lr * decay) - lr * step_B

    run(layer, optimizer, seen, 6)
    assert step == 6


def test_decay_of_the_delta():
    layer = layer_of(LoRA(r=3))
    optimizer = LoRAPro(layer, lr=0.1, weight_decay=0.5, decay="delta")
    before = (layer.lora_B @ layer.lora_A).detach()
    for factor in (layer.lora_A, layer.lora_B):
        factor.grad = torch.zeros_like(factor)
    optimizer.step()
    torch.testing.assert_close((layer.lora_B @ layer.lora_A).detach(), before * 0.95)


@each_x
@pytest.mark.parametrize("variant", ["adamw", "sgd"])
@pytest.mark.parametrize("start", [0.3, 0.0])
def test_loss_goes_down(variant, x, start):
    model = model_of(LoRA(r=3))
    with torch.no_grad():
        model[0].lora_B.mul_(start)
        model[2].lora_B.mul_(start)
    optimizer = LoRAPro(model, lr={"adamw": 5e-3, "sgd": 0.05}[variant], variant=variant, x=x)
    found = losses(model, optimizer)
    assert found[-1] < 0.8 * found[0]
    if variant == "sgd":
        assert found == sorted(found, reverse=True)


@pytest.mark.parametrize(
    "adapter",
    [LoRA(r=3), DoRA(r=3), DoRA(r=3, axis="in"), LoRA(r=3, init=PiSSA(), lora_bias=True)],
    ids=repr,
)
def test_all_else_is_torchs_own(adapter):
    for variant, kind in (("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)):
        model = model_of(adapter, bias="all")
        twin = copy.deepcopy(model)
        theirs = kind([p for p in twin.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
        for one, optimizer in (
            (model, LoRAPro(model, lr=1e-2, variant=variant, weight_decay=0.1)),
            (twin, theirs),
        ):
            loss_of(one).backward()
            optimizer.step()
        for (name, ours), other in zip(model.named_parameters(), twin.parameters(), strict=True):
            if ours.requires_grad and not name.endswith(("lora_A", "lora_B")):
                torch.testing.assert_close(ours, other, rtol=1e-6, atol=1e-7)
            elif ours.requires_grad:
                assert not torch.equal(ours, other)


def test_an_embedding_whose_A_starts_at_zero():
    table = lorafast.Embedding(6, 4, adapter=LoRA(r=2), dtype=torch.float64)
    optimizer = LoRAPro(table, lr=0.1, variant="sgd")
    target = torch.randn(6, 4, dtype=torch.float64)
    before = (table(torch.arange(6)) - target).square().sum()
    before.backward()
    optimizer.step()
    assert (table(torch.arange(6)) - target).square().sum() < before


def test_moments_of_half_precision_factors_are_in_fp32():
    model = model_of(LoRA(r=3), dtype=torch.bfloat16, adapter_dtype=torch.bfloat16)
    optimizer = LoRAPro(model, lr=1e-2)
    train(model, optimizer, 1)
    assert optimizer.state[model[0].lora_B]["exp_avg"].dtype == torch.float32


def test_memory_is_what_it_says():
    model = model_of(LoRA(r=3))
    optimizer = LoRAPro(model, lr=1e-3)
    assert optimizer.moment_bytes() == 2 * 4 * (7 * 11 + 11 * 5)
    train(model, optimizer, 1)
    kept = [
        state[key].nbytes
        for p, state in optimizer.state.items()
        for key in ("exp_avg", "exp_avg_sq")
        if p is not None
    ]
    assert sum(kept) == optimizer.moment_bytes() + 2 * 4 * (5 * 3 + 3)
    sgd = LoRAPro(model, lr=1e-3, variant="sgd")
    train(model, sgd, 1)
    assert sgd.moment_bytes() == 0
    assert not sgd.state


def test_schedulers_scalers_closures_and_copies():
    plain, scaled = model_of(LoRA(r=3)), model_of(LoRA(r=3))
    for model, scaler in ((plain, None), (scaled, torch.amp.GradScaler("cpu", init_scale=256.0))):
        optimizer = LoRAPro(model, lr=1e-2)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        for step in range(3):
            optimizer.zero_grad()
            loss = loss_of(model, step)
            (loss if scaler is None else scaler.scale(loss)).backward()
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
            schedule.step()
        assert optimizer.param_groups[0]["lr"] == 1e-2 / 8
    for name, value in trained_values(plain).items():
        torch.testing.assert_close(trained_values(scaled)[name], value, rtol=1e-4, atol=1e-5)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    again, other = copy.deepcopy((model, optimizer))
    assert torch.is_tensor(optimizer.step(closure))
    optimizer.zero_grad()
    train(again, other, 1)
    assert all(
        torch.equal(value, trained_values(again)[name])
        for name, value in trained_values(model).items()
    )


def test_the_fused_form_steps_alike():
    found = []
    for settings in ({}, {"fused": True}, {"foreach": True}):
        model = model_of(DoRA(r=3), bias="all")
        found.append(
            trained_values(train(model, LoRAPro(model, lr=1e-3, weight_decay=0.1, **settings), 3))
        )
    for other, (name, value) in itertools.product(found[1:], found[0].items()):
        torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"variant": "sgd"}, {"decay": "delta"}], ids=str)
def test_a_rate_that_is_a_tensor(settings):
    found = []
    for lr in (1e-2, torch.tensor(1e-2)):
        model = model_of(LoRA(r=3))
        found.append(
            trained_values(train(model, LoRAPro(model, lr, weight_decay=0.1, **settings), 2))
        )
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-5, atol=1e-6)


def test_what_has_no_gradient_rests():
    model = model_of(LoRA(r=3))
    optimizer, before = LoRAPro(model, lr=1e-2, weight_decay=0.1), trained_values(model)
    optimizer.step()
    loss_of(model).backward()
    model[0].lora_A.grad = model[0].lora_B.grad = None
    optimizer.step()
    changed = {
        name
        for name, value in trained_values(model).items()
        if not torch.equal(value, before[name])
    }
    assert changed == {"2.lora_A", "2.lora_B", "3.weight", "3.bias"}


def test_half_a_pair_of_gradients_and_sparse_ones_stop_the_step():
    model = model_of(LoRA(r=3))
    optimizer, before = LoRAPro(model, lr=1e-2), trained_values(model)
    loss_of(model).backward()
    grad, model[2].lora_A.grad = model[2].lora_A.grad, None
    with pytest.raises(
        RuntimeError, match=r"2 \(A \(3, 11\), B \(5, 3\)\): lora_B has a gradient and lora_A none"
    ):
        optimizer.step()
    model[2].lora_A.grad = grad.to_sparse()
    with pytest.raises(RuntimeError, match=r"gradient \(3, 11\) is sparse"):
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in trained_values(model).items())


def test_groups_have_their_own_settings_and_more_can_come():
    model = model_of(LoRA(r=3))
    for factor in (model[2].lora_A, model[2].lora_B):
        factor.requires_grad_(False)
    optimizer = LoRAPro(model, lr=1e-2)
    extra = nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [extra], "lr": 0.5, "variant": "sgd"})
    extra.sum().backward()
    pair = [factor.requires_grad_(True) for factor in (model[2].lora_A, model[2].lora_B)]
    for half, other in ((0, "lora_B"), (1, "lora_A")):
        with pytest.raises(ValueError, match=rf"2\.{other} .* is not in the group of 2\.lora"):
            optimizer.add_param_group({"params": [pair[half]]})
    optimizer.add_param_group({"params": pair, "lr": 0.0})
    optimizer.param_groups[0]["lr"] = 0.0
    before = trained_values(model)
    train(model, optimizer, 1)
    changed = {
        name
        for name, value in trained_values(model).items()
        if not torch.equal(value, before[name])
    }
    assert changed == {"3.weight", "3.bias"}
    assert torch.equal(extra.detach(), torch.full((2,), 0.5))
    assert optimizer.moment_bytes() == 2 * 4 * (7 * 11 + 11 * 5)
    assert len(optimizer.param_groups) == 4


def test_a_scaling_that_changes_and_one_that_is_zero():
    layer = layer_of(LoRA(r=3))
    optimizer, x = LoRAPro(layer, lr=0.1, variant="sgd"), torch.randn(6, 7, dtype=torch.float64)
    for scaling in (0.5, torch.tensor([3.0]), 0, torch.zeros(())):
        layer.scaling = scaling
        before = layer.lora_B.detach().clone()
        layer(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert layer.lora_B.isfinite().all()
        assert torch.equal(layer.lora_B, before) == (float(scaling) == 0)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (LoRA(r=3, freeze_A=True), r"0\.lora_A \(3, 7\) is frozen.*LoRAFA"),
        (LaMDA(r=3), r"0: LaMDA\(r=3, alpha=8\) has lora_core \(3, 3\)"),
        (VeRA(r=3), r"lora_core \(3,\)"),
    ],
)
def test_adapters_it_cannot_serve(adapter, message):
    with pytest.raises(ValueError, match=message):
        LoRAPro(model_of(adapter), lr=1e-3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": -1.0},
        {"eps": -1.0},
        {"weight_decay": -1.0},
        {"betas": (0.9, 1.0)},
        {"variant": "adam"},
        {"x": "random"},
        {"decay": "W"},
    ],
    ids=str,
)
def test_bad_settings(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LoRAPro(model_of(LoRA(r=3)), **{"lr": 1e-3} | wrong)
    with pytest.raises(ValueError, match="no adapted layer"):
        LoRAPro(nn.Linear(3, 3), lr=1e-3)
