"""GaLore against its formula written out, and against Adam where the two are one; per layer."""

import pytest
import torch
from helpers import tiny_transformers
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import lorafast
from lorafast.optim import GaLore

SETTINGS = {
    "lr": 0.03,
    "rank": 3,
    "update_gap": 3,
    "scale": 0.7,
    "betas": (0.8, 0.95),
    "eps": 1e-3,
    "weight_decay": 0.1,
}


def net(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 9), nn.Tanh(), nn.LayerNorm(9), nn.Linear(9, 5), nn.Linear(5, 5, bias=False)
    ).to(dtype)


def batch(step, dtype=torch.float64):
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step)).to(dtype)
    return x, x[:, 1:].tanh()


def train(model, optimizer, schedule, steps, first=0):
    losses = []
    for step in range(first, first + steps):
        x, y = batch(step, next(model.parameters()).dtype)
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def shrinking(optimizer):
    return LambdaLR(optimizer, lambda step: 1 / (1 + 0.01 * step))


def directly(W, gradients, lr, rank, update_gap, scale, betas, eps, weight_decay):
    """GaLore of one matrix, every step written out with its hats."""
    tall = W.shape[0] >= W.shape[1]
    M = V = 0
    for t, G in enumerate(gradients, 1):
        if (t - 1) % update_gap == 0:
            U, _, Vh = torch.linalg.svd(G)
            P = Vh[:rank] if tall else U[:, :rank]
        R = G @ P.T if tall else P.T @ G
        M = betas[0] * M + (1 - betas[0]) * R
        V = betas[1] * V + (1 - betas[1]) * R**2
        mean, square = M / (1 - betas[0] ** t), V / (1 - betas[1] ** t)
        D = mean / (square.sqrt() + eps / (1 - betas[1] ** t) ** 0.5)
        W = W - lr * weight_decay * W - lr * scale * (D @ P if tall else P @ D)
    return W


@pytest.mark.parametrize("shape", [(9, 6), (5, 9), (7, 7)])
def test_the_formula(shape):
    linear = nn.Linear(*shape[::-1], bias=False, dtype=torch.float64)
    gradients = [torch.randn(shape, dtype=torch.float64) for _ in range(8)]
    want = directly(linear.weight.detach().clone(), gradients, **SETTINGS)
    optimizer = GaLore(nn.Sequential(linear), **SETTINGS)
    for G in gradients:
        linear.weight.grad = G.clone()
        optimizer.step()
    torch.testing.assert_close(linear.weight.detach(), want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", [(9, 6), (5, 9), (7, 7)])
def test_with_the_whole_rank_it_is_adam_in_other_coordinates(shape):
    """P is then a rotation: with W = Z P (or P Z), Z goes where Adam takes it."""
    N, K = shape
    x, y = torch.randn(20, K, dtype=torch.float64), torch.randn(20, N, dtype=torch.float64)
    linear = nn.Linear(K, N, bias=False, dtype=torch.float64)
    W = linear.weight.detach().clone()
    optimizer = GaLore(
        nn.Sequential(linear), lr=0.01, rank=min(shape), update_gap=100, scale=1.0, eps=0.0
    )

    def step():
        loss = (linear(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    step()
    P = optimizer.state[linear.weight]["projection"]
    torch.testing.assert_close(P @ P.t(), torch.eye(min(shape), dtype=torch.float64))
    Z = nn.Parameter(W @ P.t() if N >= K else P.t() @ W)
    adam = torch.optim.Adam([Z], lr=0.01, eps=0.0)
    for index in range(12):
        if index:
            step()
        adam.zero_grad()
        (x @ (Z @ P if N >= K else P @ Z).t() - y).square().mean().backward()
        adam.step()
        torch.testing.assert_close(
            linear.weight.detach(), (Z @ P if N >= K else P @ Z).detach(), rtol=1e-9, atol=1e-9
        )


def test_the_rest_is_under_adamw_to_the_bit():
    model, twin = net(torch.float32), net(torch.float32)
    settings = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}
    # Of rank 6 the 9×5 and 5×5 weights are not, and count as the rest.
    ours, theirs = (
        GaLore(model, rank=6, **settings),
        torch.optim.AdamW(twin.parameters(), **settings),
    )
    assert [len(group["params"]) for group in ours.param_groups] == [1, 6]
    for step in range(5):
        torch.manual_seed(step)
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        ours.step()
        theirs.step()
    same = [torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True)]
    assert same == [False] + [True] * 6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_per_layer_is_the_same_to_the_bit_and_keeps_no_gradient(dtype):
    model, twin = net(dtype), net(dtype)
    for one, per_layer in ((model, False), (twin, True)):
        optimizer = GaLore(one, **SETTINGS, per_layer=per_layer)
        train(one, optimizer, shrinking(optimizer), 7)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.grad is not None
        assert b.grad is None


def test_per_layer_ends_with_its_optimizer():
    model = net()
    optimizer = GaLore(model, **SETTINGS, per_layer=True)
    del optimizer
    before = model[0].weight.detach().clone()
    model(batch(0)[0]).sum().backward()
    assert torch.equal(model[0].weight, before)
    assert model[0].weight.grad is not None


def test_its_states_are_of_low_rank():
    model = nn.Sequential(nn.Linear(40, 30, bias=False), nn.Linear(30, 50, bias=False))
    optimizer = GaLore(model, lr=0.1, rank=4)
    model(torch.randn(3, 40)).sum().backward()
    optimizer.step()
    numbers = [
        sum(t.numel() for n, t in optimizer.state[one.weight].items() if n != "step")
        for one in model
    ]
    assert numbers == [(min(one.weight.shape) + 2 * max(one.weight.shape)) * 4 for one in model]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_embeddings_and_the_head_are_not_projected(kind):
    model = tiny_transformers.KINDS[kind]().train()
    optimizer = GaLore(model, lr=1e-3, rank=8, svd_niter=2)
    names = {parameter: name for name, parameter in model.named_parameters()}
    projected = {names[parameter] for parameter in optimizer.param_groups[0]["params"]}
    assert all(parameter.dim() == 2 for parameter in optimizer.param_groups[0]["params"])
    assert not {
        name
        for name in projected
        if "head" in name or "embed" in name or "wte" in name or "wpe" in name
    }
    assert len(projected) == {"llama": 14, "gpt2": 8}[kind]
    loss = model(input_ids=tiny_transformers.IDS, labels=tiny_transformers.IDS).loss
    loss.backward()
    optimizer.step()
    assert model(input_ids=tiny_transformers.IDS, labels=tiny_transformers.IDS).loss < loss


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "rank=0 must be an integer of at least 1"),
        ({"rank": 100}, r"rank=100: no targeted weight .* of 0 \(9, 6\)"),
        ({"update_gap": 1.5}, r"update_gap=1\.5"),
        ({"lr": -1}, "lr=-1 must be a number in"),
        ({"scale": "a"}, "scale='a'"),
        ({"betas": (0.9, 1.0)}, r"betas=1\.0 must be a number in \[0, 1"),
        ({"betas": 0.9}, r"betas=0\.9 must be two numbers"),
        ({"svd_niter": -1}, "svd_niter=-1"),
        ({"target_modules": ["7"]}, "'7' matches no module"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        GaLore(net(), **SETTINGS | changes)


def test_a_target_that_is_no_linear_and_a_group_too_small():
    with pytest.raises(TypeError, match="matches 2, a LayerNorm and no linear"):
        GaLore(net(), **SETTINGS, target_modules=["0", "2"])
    optimizer = GaLore(net(), **SETTINGS)
    with pytest.raises(ValueError, match=r"rank=3: params has a \(2, 9\), too small"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2, 9))], "rank": 3})
    assert len(optimizer.param_groups) == 2


def test_a_gradient_that_is_not_finite_changes_nothing():
    model = net()
    optimizer = GaLore(model, **SETTINGS)
    model(batch(0)[0]).sum().backward()
    model[3].weight.grad[0, 0] = float("nan")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"gradient of a weight \(5, 9\) is not finite"):
        optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_adapted_model_has_no_weight_to_project():
    with pytest.raises(ValueError, match="no targeted weight requires grad"):
        GaLore(lorafast.adapt(net(), lorafast.LoRA(r=2)), **SETTINGS)
