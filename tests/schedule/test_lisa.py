"""LISA: the blocks that train, what optimizers see of the others, resuming, refusals."""

import copy
import itertools

import pytest
import torch
from helpers import tiny_transformers
from torch import nn

import lorafast
from lorafast.schedule import LISA

BLOCKS = 4


class Net(nn.Module):
    def __init__(self, dtype=torch.float32, blocks=BLOCKS):
        torch.manual_seed(0)
        super().__init__()
        self.embed = nn.Linear(5, 6, dtype=dtype)
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(nn.Linear(6, 6, dtype=dtype) for _ in range(blocks))
        self.norm, self.head = (
            nn.LayerNorm(6, dtype=dtype),
            nn.Linear(6, 3, bias=False, dtype=dtype),
        )

    def forward(self, x):
        x = self.embed(x)
        for block in self.model.layers:
            x = x + block(x).tanh()
        return self.head(self.norm(x))


def optimizer_of(model, **settings):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.3, **settings)


def train(model, optimizer, schedule, steps, first=0):
    for step in range(first, first + steps):
        torch.manual_seed(100 + step)
        model(torch.randn(8, 5)).square().mean().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def drawn(schedule, switches):
    """The blocks that train, the first and after each of so many switches."""
    found = [schedule.chosen]
    for _ in range(switches):
        for _ in range(schedule.every):
            schedule.step()
        found.append(schedule.chosen)
    return found


@pytest.mark.parametrize("active", range(1, BLOCKS + 1))
def test_blocks_are_drawn_without_replacement_until_every_set_of_them_was(active):
    found = drawn(LISA(Net(), active=active, every=1, seed=3), 120)
    assert all(len(set(one)) == active and set(one) <= set(range(BLOCKS)) for one in found)
    assert set(found) == set(itertools.combinations(range(BLOCKS), active))


def test_a_seed_is_a_choice_and_none_is_torchs():
    assert drawn(LISA(Net(), seed=5, every=3), 20) == drawn(LISA(Net(), seed=5, every=3), 20)
    assert drawn(LISA(Net(), seed=5, every=3), 20) != drawn(LISA(Net(), seed=6, every=3), 20)
    found = []
    for _ in range(2):
        model = Net()
        torch.manual_seed(9)
        schedule = LISA(model, every=1)
        torch.manual_seed(10)  # what comes later does not matter
        found.append(drawn(schedule, 20))
    assert found[0] == found[1]


def test_others_come_every_so_many_steps():
    schedule = LISA(Net(), active=1, every=5, seed=0)
    chosen = [schedule.chosen]
    for _ in range(60):
        schedule.step()
        chosen.append(schedule.chosen)
    assert all(chosen[step] == chosen[step - step % 5] for step in range(60))
    assert len(set(chosen)) == BLOCKS


@pytest.mark.parametrize(
    "settings", [{}, {"foreach": True}, {"fused": True}, {"amsgrad": True}], ids=str
)
def test_what_rests_stays_as_it_is_to_the_bit(settings):
    model = Net()
    optimizer, schedule = optimizer_of(model, **settings), LISA(model, every=3, seed=1)
    rested = set()
    for step in range(24):
        chosen, before = schedule.chosen, tiny_transformers.copied_tensors(model)
        train(model, optimizer, schedule, 1, step)
        for name, value in model.named_parameters():
            resting = name.startswith("model.layers.") and int(name.split(".")[2]) not in chosen
            assert torch.equal(value, before[name]) == resting
            rested |= {name} if resting and optimizer.state.get(value) else set()
    # With momentum from an earlier turn in the optimizer, too.
    assert len(rested) == 2 * BLOCKS


def test_the_gradients_of_what_trains_are_those_of_the_whole_model():
    whole, model = Net(torch.float64), Net(torch.float64)
    schedule, x = LISA(model, active=1, seed=2), torch.randn(7, 5, dtype=torch.float64)
    for one in (whole, model):
        one(x).square().sum().backward()
    theirs = dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        if name.startswith("model.layers.") and int(name.split(".")[2]) not in schedule.chosen:
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-14, atol=0)


def test_a_block_that_comes_to_rest_keeps_no_gradient():
    model = Net()
    schedule = LISA(model, active=BLOCKS, every=1, seed=0)
    model(torch.randn(8, 5)).square().mean().backward()
    schedule.active = 1
    schedule.step()
    for index, block in enumerate(model.model.layers):
        assert all(
            (p.grad is not None) == p.requires_grad == (index in schedule.chosen)
            for p in block.parameters()
        )
    assert model.head.weight.grad is not None


@pytest.mark.parametrize("forget", [False, True])
def test_states_of_resting_blocks_are_kept_unless_the_optimizer_is_given(forget):
    model = Net()
    optimizer = optimizer_of(model)
    schedule = LISA(model, every=2, seed=1, optimizer=optimizer if forget else None)
    train(model, optimizer, schedule, 40)
    held = {i for i, block in enumerate(model.model.layers) if optimizer.state.get(block.weight)}
    assert held <= set(schedule.chosen) if forget else held == set(range(BLOCKS))
    assert all(optimizer.state[p] for p in (model.embed.weight, model.head.weight))


def test_a_run_that_forgets_states_of_resting_blocks_resumes_to_the_bit():
    def made():
        model = Net()
        optimizer = optimizer_of(model)
        return model, optimizer, LISA(model, every=3, seed=4, optimizer=optimizer)

    straight = made()
    train(*straight, 7)
    saved = copy.deepcopy([part.state_dict() for part in straight])
    train(*straight, 20, 7)
    resumed = made()
    train(*resumed, 2)
    for part, state in zip(resumed, saved, strict=True):
        part.load_state_dict(state)
    train(*resumed, 20, 7)
    assert resumed[2].chosen == straight[2].chosen
    for name, value in straight[0].state_dict().items():
        assert torch.equal(value, resumed[0].state_dict()[name])


def test_what_the_user_froze_stays_frozen_and_close_gives_the_rest_back():
    model = Net()
    model.embed.requires_grad_(False)
    for block in model.model.layers:
        block.bias.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    with LISA(model, active=2, every=1, seed=0) as schedule:
        for _ in range(20):
            schedule.step()
            for name, parameter in model.named_parameters():
                resting = (
                    name.startswith("model.layers.")
                    and int(name.split(".")[2]) not in schedule.chosen
                )
                assert parameter.requires_grad == (flags[name] and not resting)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    model.head.requires_grad_(False)
    schedule.close()  # once more, and no more
    assert not model.head.weight.requires_grad
    for call in (
        schedule.step,
        schedule.__enter__,
        lambda: schedule.load_state_dict(schedule.state_dict()),
    ):
        with pytest.raises(RuntimeError, match="this LISA is closed"):
            call()


def test_transformers():
    for make, layers in (
        (tiny_transformers.llama, "model.layers"),
        (tiny_transformers.gpt2, "transformer.h"),
    ):
        model = make()
        schedule = LISA(model, layers, active=1, seed=0)
        model(input_ids=tiny_transformers.IDS, labels=tiny_transformers.IDS).loss.backward()
        other = model.get_submodule(layers)[1 - schedule.chosen[0]]
        assert {n for n, p in model.named_parameters() if p.grad is None} == {
            n for n, p in model.named_parameters() if any(p is q for q in other.parameters())
        }


def untouched(model, match, error=ValueError, **settings):
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=match):
        LISA(model, **settings)
    assert [p.requires_grad for p in model.parameters()] == flags


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"active": 0}, "active=0 must be an integer of at least 1"),
        ({"active": True}, "active=True"),
        ({"active": BLOCKS + 1}, "active=5 is more than the 4 blocks"),
        ({"every": 1.5}, r"every=1\.5"),
        (
            {"layers": "model.layer"},
            r"layers='model\.layer' must name an nn\.ModuleList of model Net; .*model\.layers",
        ),
        (
            {"layers": "embed"},
            r"layers='embed' must name an nn\.ModuleList of model Net; .*model\.layers",
        ),
    ],
)
def test_bad_settings(settings, message):
    untouched(Net(), message, **settings)


def test_blocks_that_cannot_rest_by_themselves():
    tied = Net()
    tied.model.layers[2].weight = tied.model.layers[0].weight
    untouched(tied, r"model\.layers\.0 and model\.layers\.2 share a parameter")
    outside = Net()
    outside.extra = nn.Linear(6, 6)
    outside.extra.weight = outside.model.layers[1].weight
    untouched(outside, r"extra\.weight \(6, 6\) is tied to one of model\.layers\.1")
    for p in (tied.model.layers[0].weight, outside.extra.weight):  # frozen, it rests anyway
        p.requires_grad_(False)
    LISA(tied)
    LISA(outside)
    untouched(Net().requires_grad_(False), "no parameter of these blocks trains")
    adapted = lorafast.adapt(Net(), lorafast.LoRA(r=2), target_modules=["layers.1"])
    untouched(
        adapted,
        r"model\.layers\.1 has LoRA\(r=2, alpha=8\): LISA trains a plain model's own weights",
    )
    untouched(nn.Linear(2, 2), "; it has none")
    with pytest.raises(TypeError, match="model must be a"):
        LISA([Net()])


def test_an_optimizer_of_the_chosen_alone_is_refused():
    model = Net()
    model.model.layers[0].requires_grad_(False)
    optimizer = optimizer_of(model.head)
    untouched(model, r"optimizer lacks 6 parameters of model\.layers", optimizer=optimizer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": 3}, "blocks=3, this one has 4"),
        ({"chosen": [1]}, r"chosen=\[1\] of the state must be active=2 of 4"),
        ({"chosen": [1, 1]}, "chosen="),
        ({"chosen": [1, 4]}, "chosen="),
        ({"every": 0}, "every=0"),
        ({"more": 0}, "must hold"),
    ],
)
def test_a_state_that_is_none_changes_nothing(change, message):
    schedule = LISA(Net(), seed=0)
    before = copy.deepcopy(schedule.state_dict())
    with pytest.raises(ValueError, match=message):
        schedule.load_state_dict(before | change)
    after = schedule.state_dict()
    assert torch.equal(after.pop("generator"), before.pop("generator"))
    assert after == before
