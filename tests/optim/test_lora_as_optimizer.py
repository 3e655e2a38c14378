"""LoRAAsOptimizer goes where LoRA layers go, and W where W₀ + sBA does."""

import pytest
import torch
from helpers import tiny_transformers
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LambdaLR

import lorafast
from lorafast import LoRA, PiSSA
from lorafast.optim import GaLore, LoRAAsOptimizer

R, ALPHA = 3, 5
KINDS = {
    "sgd": (SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}, {}),
    "adamw": (AdamW, {"lr": 0.02, "weight_decay": 0.1}, {}),
    "adamw-pissa": (AdamW, {"lr": 0.02}, {"init": PiSSA()}),
    "adamw-rslora": (AdamW, {"lr": 0.02}, {"rslora": True, "init": "gaussian"}),
    "sgd-fa": (SGD, {"lr": 0.1}, {"freeze_A": True}),
}


def net(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5, bias=False), nn.Linear(5, 5)
    ).to(dtype)


def loss_of(model, step, rows=slice(None)):
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step)).to(
        next(model.parameters()).dtype
    )[rows]
    return (model(x) - x[:, 1:].tanh()).square().mean()


def train(model, optimizer, schedule, steps, first=0):
    losses = []
    for step in range(first, first + steps):
        optimizer.zero_grad()
        losses.append(loss_of(model, step))
        losses[-1].backward()
        optimizer.step()
        schedule.step()
    return torch.stack(losses).detach()


def shrinking(optimizer):
    return LambdaLR(optimizer, lambda step: 1 / (1 + 0.1 * step))


def made(model, kind="adamw", **options):
    optimizer_class, settings, fields = KINDS[kind]
    return LoRAAsOptimizer(
        model, optimizer_class, r=R, alpha=ALPHA, seed=7, **settings, **fields, **options
    )


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_path_is_that_of_lora_layers(kind, per_layer):
    optimizer_class, settings, fields = KINDS[kind]
    layers = lorafast.adapt(net(), LoRA(r=R, alpha=ALPHA, **fields), seed=7)
    theirs = optimizer_class([p for p in layers.parameters() if p.requires_grad], **settings)
    plain = net()
    ours = made(plain, kind, per_layer=per_layer)
    for mine, layer in zip(ours._factored_weights, (layers[0], layers[2], layers[3]), strict=True):
        assert torch.equal(mine.A, layer.lora_A)
    losses = train(plain, ours, shrinking(ours), 25)
    torch.testing.assert_close(
        losses, train(layers, theirs, shrinking(theirs), 25), rtol=1e-9, atol=1e-11
    )
    for index in (0, 2, 3):
        layer = layers[index]
        W = layer.weight + layer.scaling * layer.lora_B @ layer.lora_A
        torch.testing.assert_close(plain[index].weight.detach(), W.detach(), rtol=1e-9, atol=1e-11)
        if plain[index].bias is not None:
            assert torch.equal(plain[index].bias, layer.bias)


def test_one_step_of_gradient_descent_written_out():
    model, eta = net(), 0.3
    optimizer = LoRAAsOptimizer(model, SGD, lr=eta, r=R, alpha=ALPHA, init=PiSSA())
    held, s = optimizer._factored_weights[0], ALPHA / R
    A, B, W = held.A.detach().clone(), held.B.detach().clone(), model[0].weight.detach().clone()
    loss_of(model, 0).backward()
    G = model[0].weight.grad.clone()
    optimizer.step()
    first_order = -eta * s**2 * (B @ B.t() @ G + G @ A.t() @ A)
    second_order = eta**2 * s**3 * G @ A.t() @ B.t() @ G
    torch.testing.assert_close(
        model[0].weight.detach(), W + first_order + second_order, rtol=1e-12, atol=1e-13
    )


def test_with_a_frozen_A_it_is_projected_gradient_descent():
    model = net()
    optimizer = made(model, "sgd-fa")
    A = optimizer._factored_weights[0].A.detach().clone()
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        W, G = model[0].weight.detach().clone(), model[0].weight.grad.clone()
        optimizer.step()
        torch.testing.assert_close(
            model[0].weight.detach(),
            W - 0.1 * (ALPHA / R) ** 2 * G @ A.t() @ A,
            rtol=1e-12,
            atol=1e-13,
        )
    assert torch.equal(optimizer._factored_weights[0].A, A)
    assert len(optimizer.factors) == 3


def test_per_layer_adds_batches_up_and_can_be_clipped():
    whole, parts = net(), net()
    ours, theirs = made(whole), made(parts, per_layer=True)
    for step in range(4):
        ours.zero_grad()
        theirs.zero_grad()
        (2 * loss_of(whole, step)).backward()
        for rows in (slice(4), slice(4, 8)):
            loss_of(parts, step, rows).backward()
            assert all(parameter.grad is None for parameter in parts.parameters())
        before = [one.B.detach().clone() for one in theirs._factored_weights]
        assert nn.utils.clip_grad_norm_(theirs.factors, 1e9) > 0
        ours.step()
        theirs.step()
        assert not any(
            torch.equal(one.B, B) for one, B in zip(theirs._factored_weights, before, strict=True)
        )
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("compensate", [True, False])
def test_what_roundings_lose_is_not_lost(compensate):
    """Far below half an ulp of a bf16 weight, W follows W₀ + sBA to a rounding, or hardly moves."""
    model = net(torch.bfloat16)
    start = [model[i].weight.detach().double() for i in (0, 2, 3)]
    optimizer = LoRAAsOptimizer(model, AdamW, lr=2e-4, r=R, alpha=ALPHA, compensate=compensate)
    train(model, optimizer, LambdaLR(optimizer, lambda step: 1.0), 150)
    ratios = []
    for one, W in zip(optimizer._factored_weights, start, strict=True):
        exact = W + ALPHA / R * one.B.detach().double() @ one.A.detach().double()
        ratios.append(
            (one.weight.detach().double() - exact).norm()
            / (exact.bfloat16().double() - exact).norm()
        )
    assert max(ratios) < 1.5 if compensate else max(ratios) > 4


@pytest.mark.parametrize("train_rest", [False, True])
def test_what_trains(train_rest):
    model = net()
    model[0].bias.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = made(model, target_modules=["0", "2"], train_rest=train_rest)
    rest = {"3.weight", "3.bias"} if train_rest else set()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        "0.weight",
        "2.weight",
    } | rest
    train(model, optimizer, shrinking(optimizer), 2)
    assert {
        name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])
    } == {"0.weight", "2.weight"} | rest
    assert {group["lr"] for group in optimizer._factor_optimizer.param_groups} == {0.02 / 1.1}


def test_per_layer_trains_weights_that_were_frozen():
    model = net().requires_grad_(False)
    before = model[0].weight.clone()
    optimizer = made(model, per_layer=True)
    train(model, optimizer, shrinking(optimizer), 2)
    assert not torch.equal(model[0].weight, before)


def test_conv1d_lies_transposed():
    layers, plain = tiny_transformers.gpt2().double(), tiny_transformers.gpt2().double()
    layers = lorafast.adapt(layers, LoRA(r=R, alpha=ALPHA), seed=7)
    theirs = AdamW([p for p in layers.parameters() if p.requires_grad], lr=0.01)
    ours = LoRAAsOptimizer(plain, AdamW, lr=0.01, r=R, alpha=ALPHA, seed=7)
    for _ in range(3):
        losses = []
        for model, optimizer in ((layers, theirs), (plain, ours)):
            optimizer.zero_grad()
            losses.append(model(input_ids=tiny_transformers.IDS, labels=tiny_transformers.IDS).loss)
            losses[-1].backward()
            optimizer.step()
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"optimizer_class": "AdamW"}, TypeError, "optimizer_class must be a class of torch.optim"),
        ({"r": 0}, ValueError, "r=0 must be"),
        ({"alpha": "x"}, ValueError, "alpha='x'"),
        ({"init": "zero"}, ValueError, "init='zero'"),
        ({"lr": -1.0}, ValueError, "learning rate"),
        ({"target_modules": ["1"]}, TypeError, "matches 1, a Tanh and no linear"),
        ({"nesterov": True}, TypeError, "nesterov"),
    ],
)
def test_refusals_leave_the_model_alone(arguments, error, message):
    model = net()
    with pytest.raises(error, match=message):
        LoRAAsOptimizer(model, **{"optimizer_class": AdamW, "lr": 0.1, "r": 2} | arguments)
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ValueError, match="0 has an adapter already"):
        LoRAAsOptimizer(lorafast.adapt(model, LoRA(r=2)), AdamW, lr=0.1)


def test_a_state_of_another_rank_and_further_groups_are_refused():
    model = net()
    optimizer = made(model)
    before = optimizer._factored_weights[0].A.detach().clone()
    other = LoRAAsOptimizer(net(), AdamW, lr=0.1, r=2)
    with pytest.raises(ValueError, match=r"\(2, 6\).* for 0, this optimizer .*\(3, 6\)"):
        optimizer.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="lacks factors and inner"):
        optimizer.load_state_dict(AdamW(net().parameters()).state_dict())
    with pytest.raises(NotImplementedError, match="train_rest=True"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    assert torch.equal(optimizer._factored_weights[0].A, before)


def test_where_processes_train_together(monkeypatch):
    parallel = nn.Module.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(parallel)
    parallel.module = net()
    for make in (
        lambda: GaLore(parallel, lr=0.1, rank=2, per_layer=True),
        lambda: made(parallel, per_layer=True),
    ):
        with pytest.raises(
            ValueError, match="per_layer=True: DistributedDataParallel needs every gradient"
        ):
            make()
    assert all(held.target.name in ("0", "2", "3") for held in made(parallel)._factored_weights)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(ValueError, match="seed=None: in a process group"):
        LoRAAsOptimizer(net(), AdamW, lr=0.1)
