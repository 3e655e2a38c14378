"""The contract of schedules: a saved state resumes to the bit; a refusal changes nothing."""

import copy
import io

import pytest
import torch
from torch import nn

import lorafast
from lorafast import AdaLoRA, AFLoRA, LaMDA, LoRA, schedule

WIDE, INNER, STEPS = 7, 9, 16


class Net(nn.Module):
    """Four blocks between two linears."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(WIDE, INNER), nn.Linear(INNER, WIDE, bias=False)
        self.blocks = nn.ModuleList(nn.Linear(INNER, INNER) for _ in range(4))

    def forward(self, x):
        x = torch.tanh(self.up(x))
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.down(x)


def adapted(adapter):
    """A function that makes an adapted net."""
    return lambda: lorafast.adapt(Net(), adapter, ["up", "down"], seed=1)


# By class: how a model for it is made, the settings of a run, other settings, a bad one.
SCHEDULES = {
    "LaMDAFreeze": (
        adapted(LaMDA(r=4)),
        {"total_steps": STEPS, "fraction": 0.8},
        {"total_steps": 99},
        {"total_steps": 0},
    ),
    "AdaLoRA": (
        adapted(AdaLoRA(r=4, target_r=2)),
        {"total_steps": STEPS, "tinit": 2, "tfinal": 3, "deltaT": 2},
        {"total_steps": 99},
        {"total_steps": 0},
    ),
    "AFLoRA": (
        adapted(AFLoRA(r=3)),
        {"total_steps": STEPS, "warmup": 2, "final": 3, "deltaT": 2},
        {"total_steps": 99},
        {"total_steps": 0},
    ),
    "LISA": (
        Net,
        {"layers": "blocks", "active": 1, "every": 3, "seed": 4},
        {"layers": "blocks", "active": 2, "every": 7, "seed": 5},
        {"layers": "blocks", "every": 0},
    ),
}
each = pytest.mark.parametrize("name", SCHEDULES)


def make(name, settings=None):
    """A model, an optimizer of what trains in it, and the named schedule."""
    model_for, usual, *_ = SCHEDULES[name]
    model = model_for()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.3)
    return model, optimizer, getattr(schedule, name)(model, **(settings or usual))


def train(model, optimizer, planned, first, last):
    """Steps first … last - 1 of an ordinary loop."""
    for step in range(first, last):
        generator = torch.Generator().manual_seed(100 + step)
        x = torch.randn(8, WIDE, generator=generator)
        loss = (model(x) - x.roll(1, 1)).square().mean()
        (loss + planned.penalty() if hasattr(planned, "penalty") else loss).backward()
        optimizer.step()
        planned.step()
        optimizer.zero_grad()


def saved(parts):
    """The states of several parts as a file gives them back, plain values and tensors alone."""
    file = io.BytesIO()
    torch.save([part.state_dict() for part in parts], file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_equal(some, others):
    """Two models hold the same bits, and the same parameters train."""
    for (name, one), other in zip(some.named_parameters(), others.parameters(), strict=True):
        assert torch.equal(one, other), name
        assert one.requires_grad == other.requires_grad, name


def test_every_schedule_there_is_is_tested():
    assert set(SCHEDULES) == set(schedule.__all__)


@each
@pytest.mark.parametrize("at", [1, 6, 12, 13, STEPS])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)], ids=["model first", "schedule first"])
def test_a_resumed_run_is_the_run_that_went_on_to_the_bit(name, at, order):
    straight = make(name)
    train(*straight, 0, at)
    states = saved(straight)
    train(*straight, at, STEPS + 2)
    # Made anew with other settings: what was saved decides.
    resumed = make(name, SCHEDULES[name][2])
    for i in order:
        resumed[i].load_state_dict(states[i])
    train(*resumed, at, STEPS + 2)
    assert_equal(straight[0], resumed[0])
    assert str(resumed[2].state_dict()) == str(straight[2].state_dict())


@each
def test_a_state_given_back_changes_nothing_and_an_early_one_lets_all_train_again(name):
    model, optimizer, planned = make(name)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    early = copy.deepcopy(planned.state_dict())
    train(model, optimizer, planned, 0, STEPS)
    late = copy.deepcopy(planned.state_dict())
    planned.load_state_dict(late)
    assert str(planned.state_dict()) == str(late)
    assert planned.last_step == STEPS
    planned.load_state_dict(early)
    assert planned.last_step == 0
    assert [parameter.requires_grad for parameter in model.parameters()] == flags


@each
def test_what_the_user_froze_stays_frozen(name):
    model, optimizer, planned = make(name)
    frozen = model.up.lora_B if hasattr(model.up, "lora_B") else model.blocks[0].bias
    frozen.requires_grad_(False)
    planned = getattr(schedule, name)(model, **SCHEDULES[name][1])
    assert not {frozen} & set(planned.parameters())
    early = copy.deepcopy(planned.state_dict())
    train(model, optimizer, planned, 0, STEPS)
    planned.load_state_dict(early)
    assert not frozen.requires_grad


@each
@pytest.mark.parametrize("change", ["a key is missing", "a key is new"])
def test_a_state_that_is_none_changes_nothing(name, change):
    model, optimizer, planned = make(name)
    train(model, optimizer, planned, 0, 5)
    before, values = copy.deepcopy(planned.state_dict()), copy.deepcopy(model.state_dict())
    wrong = copy.deepcopy(before)
    if change == "a key is missing":
        wrong.popitem()
    else:
        wrong["more"] = 0
    with pytest.raises(ValueError, match="must hold"):
        planned.load_state_dict(wrong)
    assert str(planned.state_dict()) == str(before)
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())


@each
@pytest.mark.parametrize("step", [-1, 1.5, True, None])
def test_a_state_after_no_number_of_steps_is_refused(name, step):
    model, optimizer, planned = make(name)
    train(model, optimizer, planned, 0, 5)
    before = copy.deepcopy(planned.state_dict())
    with pytest.raises(ValueError, match="last_step="):
        planned.load_state_dict(before | {"last_step": step})
    assert str(planned.state_dict()) == str(before)


@each
def test_parameters_are_what_an_optimizer_must_have(name):
    model, optimizer, planned = make(name)
    parameters = planned.parameters()
    assert len(set(parameters)) == len(parameters) > 0
    train(model, optimizer, planned, 0, STEPS)
    assert planned.parameters() == parameters


@each
def test_models_and_settings_that_are_refused(name):
    kind, (model_for, usual, _, wrong) = getattr(schedule, name), SCHEDULES[name]
    with pytest.raises(TypeError, match="model must be a"):
        kind([model_for()], **usual)
    ((setting, value),) = (wrong.items() - {"layers": "blocks"}.items()) or wrong.items()
    model = model_for()
    flags = [parameter.requires_grad for parameter in model.parameters()]
    for bad in (value, 1.5, True, "5"):
        with pytest.raises(ValueError, match=f"{setting}="):
            kind(model, **usual | {setting: bad})
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    other = lorafast.adapt(Net(), LoRA(r=2), ["blocks.0", "blocks.1", "blocks.2", "blocks.3"])
    with pytest.raises(ValueError, match=r"has no |LISA trains a plain model"):
        kind(other, **usual)
