"""lorafast.spectral_ranks: energies, budget, order, and ranks that adapt, train and load."""

import itertools
import random

import pytest
import torch
from torch import nn

import lorafast
from lorafast import LaMDA, LoRA
from lorafast.models import ranks


def net():
    """Five layers with spectra from flat to steep, and one too small for most ranks."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Linear(10, 10, bias=False) for _ in range(5)), nn.Linear(10, 3)
    ).double()
    with torch.no_grad():
        for i in range(5):
            U, S, Vh = torch.linalg.svd(model[i].weight)
            model[i].weight.copy_(U * S[0] * (0.95 - 0.15 * i) ** torch.arange(10) @ Vh)
    return model


def given(model, **options):
    return list(
        lorafast.spectral_ranks(
            model, **{"ranks": (2, 4, 8), "target_modules": list("01234")} | options
        ).values()
    )


@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (5, 5)])
@pytest.mark.parametrize("niter", [None, 0, 40])
def test_energies(shape, niter):
    weight = torch.randn(shape, dtype=torch.float64)
    S = torch.linalg.svdvals(weight).square()
    for r in (1, 3, 4):
        torch.testing.assert_close(
            ranks.energy(weight, r, niter), float(S[:r].sum() / S.sum()), rtol=1e-12, atol=0
        )
    assert ranks.energy(weight, min(shape)) == ranks.energy(weight, 99) == 1
    assert ranks.energy(torch.zeros(shape), 2) == 1


def test_the_order_is_that_of_the_energies():
    found = given(net(), budget=4.4)
    assert found == [8, 8, 2, 2, 2]
    assert given(net(), budget=4.4, direction="high_energy_more") == found[::-1]
    assert given(net()[:5], budget=4.4, energy_rank=9, target_modules="all-linear") == found
    assert given(net(), budget=8) == [8] * 5
    assert given(net(), budget=2) == [2] * 5
    assert given(net(), ranks={4}) == [4] * 5
    assert sum(given(net())) == 5 * 4
    # What uses the budget whole comes before what prefers the largest rank.
    assert given(net(), ranks=(3, 4, 6), budget=3.8) == [6, 4, 3, 3, 3]
    assert given(net(), ranks=(3, 5, 6), budget=3.8) == [5, 5, 3, 3, 3]


def test_equal_layers_keep_the_models_order():
    layer = nn.Linear(9, 9)
    model = nn.Sequential(*(nn.Linear(9, 9) for _ in range(4)))
    for one in model:
        one.load_state_dict(layer.state_dict())
    for direction in ranks.DIRECTIONS:
        assert given(model, target_modules="all-linear", budget=4, direction=direction) == [
            8,
            4,
            2,
            2,
        ]


def test_the_budget_is_used_as_far_as_the_order_allows():
    draw = random.Random(0)
    for _ in range(100):
        choice = sorted(draw.sample(range(1, 20), draw.randint(1, 4)), reverse=True)
        caps = [draw.randint(1, 24) for _ in range(draw.randint(1, 5))]
        budget = draw.uniform(choice[-1], choice[0] + 1)
        orders = itertools.combinations_with_replacement(choice, len(caps))
        found = [[min(r, cap) for r, cap in zip(one, caps, strict=True)] for one in orders]
        most = max(sum(one) for one in found if sum(one) <= budget * len(caps) + 1e-9)
        ours = ranks.allocate(choice, caps, budget)
        assert ours == max(one for one in found if sum(one) == most)


def test_a_small_layer_takes_what_it_has():
    model = net()
    assert given(model, ranks=(8, 4), budget=8, target_modules="all-linear") == [8] * 5 + [3]
    assert given(model, ranks=[8], budget=7.2, target_modules="all-linear") == [8] * 5 + [3]


@pytest.mark.parametrize("adapter", [LaMDA(r=5, alpha=4), LoRA(r=5)], ids=repr)
def test_ranks_adapt_train_and_load(adapter, tmp_path):
    pattern = lorafast.spectral_ranks(net(), (2, 4, 8), 3.9)
    model = lorafast.adapt(net(), adapter, rank_pattern=pattern)
    assert {name: layer.r for name, layer in model.named_children()} == pattern
    assert len(set(pattern.values())) > 2
    x, optimizer = (
        torch.randn(20, 10, dtype=torch.float64),
        torch.optim.AdamW(lorafast.adapter_parameters(model), lr=3e-2),
    )
    losses = []
    for _ in range(30):
        loss = (model(x) - 1).square().mean()
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.6 * losses[0]
    lorafast.save_adapter(model, tmp_path)
    loaded = lorafast.load_adapter(net(), tmp_path)
    assert {name: layer.r for name, layer in loaded.named_children()} == pattern
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-12, atol=1e-13)


def test_a_name_that_ends_another_means_its_own_layer():
    class Twin(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.fc, self.inner = nn.Linear(9, 9), nn.ModuleDict({"fc": nn.Linear(9, 9)})
            nn.init.eye_(self.fc.weight)
            nn.init.constant_(self.inner["fc"].weight, 1)

    model = Twin()
    pattern = lorafast.spectral_ranks(model, (1, 4), 2.5)
    lorafast.adapt(model, LoRA(), rank_pattern=pattern)
    assert (model.fc.r, model.inner["fc"].r) == (4, 1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ranks": ()}, ValueError, r"ranks=\(\) must be integers"),
        ({"ranks": "8"}, ValueError, "ranks='8'"),
        ({"ranks": (4, 0)}, ValueError, r"ranks=\(4, 0\)"),
        ({"ranks": (4, True)}, ValueError, "ranks="),
        (
            {"budget": 1.9},
            ValueError,
            r"budget=1\.9 is a sum of 9 for 5 layers; ranks of at least 2 take 10",
        ),
        ({"budget": -1}, ValueError, "budget=-1 must be a positive number"),
        ({"budget": "4"}, ValueError, "budget='4'"),
        ({"energy_rank": 0}, ValueError, "energy_rank=0"),
        ({"direction": "more"}, ValueError, "direction='more' must be one of 'low_energy_more'"),
        ({"svd_niter": -1}, ValueError, "svd_niter=-1"),
        ({"target_modules": ["x"]}, ValueError, "'x' matches no module"),
        ({"model": 3}, TypeError, "model must be a torch.nn.Module, not int"),
        ({"model": net().to("meta")}, ValueError, r"0\.weight \(10, 10\) is on the meta device"),
    ],
)
def test_refusals(options, error, message):
    with pytest.raises(error, match=message):
        given(**{"model": net()} | options)
