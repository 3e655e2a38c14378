"""The contract of optimizers: they are torch's, resume to the bit, and refuse in words."""

import copy
import io
import pickle

import pytest
import torch
from helpers.optimizer_runs import INNER, NARROW, WIDE, loss_of, model_of
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LambdaLR

import lorafast
from lorafast import DoRA, LaMDA, LoRA, PiSSA, optim

LR = 5e-3


def plain(dtype=torch.float32):
    """A model without adapters, of the shapes of model_of."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(WIDE, INNER),
        nn.Tanh(),
        nn.Linear(INNER, NARROW, bias=False),
        nn.Linear(NARROW, 3),
    ).to(dtype)


def adapted(adapter, dtype=torch.float32):
    """A function that makes an adapted model with factors of the given dtype."""
    return lambda: model_of(adapter, dtype, adapter_dtype=dtype)


FROZEN_A = DoRA(r=3, freeze_A=True)
HALF = torch.bfloat16
# By class: how a model for it is made, positional arguments behind the model, keyword arguments.
USUAL = {
    "LoRAPlus": (adapted(LoRA(r=3)), (AdamW,), {}),
    "LoRAPro": (adapted(LoRA(r=3)), (), {}),
    "LoRAFA": (adapted(FROZEN_A), (), {}),
    "GaLore": (plain, (), {"rank": 2, "update_gap": 2}),
    "LoRAAsOptimizer": (plain, (AdamW,), {"r": 2, "seed": 7, "train_rest": True}),
}
RESUMED = [
    ("LoRAPlus", adapted(DoRA(r=3, init=PiSSA())), {"weight_decay": 0.1, "fused": True}),
    ("LoRAPlus", adapted(LaMDA(r=3)), {"weight_decay": 0.1, "amsgrad": True}),
    ("LoRAPro", adapted(LoRA(r=3)), {"weight_decay": 0.1}),
    ("LoRAPro", adapted(DoRA(r=3)), {"variant": "sgd"}),
    ("LoRAPro", adapted(LoRA(r=3)), {"weight_decay": 0.1, "fused": True}),
    ("LoRAPro", adapted(DoRA(r=3)), {"x": "symmetric", "foreach": True, "decay": "delta"}),
    ("LoRAPro", adapted(LoRA(r=3), HALF), {}),
    ("LoRAFA", adapted(FROZEN_A), {"weight_decay": 0.1}),
    ("LoRAFA", adapted(FROZEN_A), {"foreach": True}),
    ("LoRAFA", adapted(FROZEN_A), {"fused": True}),
    ("LoRAFA", adapted(FROZEN_A, HALF), {"amsgrad": True}),
    ("GaLore", plain, {"weight_decay": 0.1}),
    ("GaLore", lambda: plain(HALF), {"weight_decay": 0.1}),
    ("GaLore", plain, {"per_layer": True}),
    ("GaLore", lambda: plain(HALF), {"per_layer": True}),
    ("LoRAAsOptimizer", plain, {"weight_decay": 0.1}),
    ("LoRAAsOptimizer", lambda: plain(HALF), {"train_rest": False}),
    ("LoRAAsOptimizer", plain, {"per_layer": True}),
    ("LoRAAsOptimizer", lambda: plain(HALF), {"per_layer": True}),
]
each = pytest.mark.parametrize("name", USUAL)


def make(name, model=None, lr=LR, **settings):
    """A model and an optimizer of the named class."""
    model_for, arguments, usual = USUAL[name]
    model = model_for() if model is None else model
    return model, getattr(optim, name)(model, *arguments, **{"lr": lr} | usual | settings)


def train(model, optimizer, schedule, steps, first=0):
    """Steps of an ordinary loop with a learning-rate schedule."""
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        schedule.step()


def shrinking(optimizer):
    """A schedule whose rate differs at every step."""
    return LambdaLR(optimizer, lambda step: 1 / (1 + 0.1 * step))


def equal(some, others):
    """True if two state dicts of a model hold the same bits."""
    return all(torch.equal(value, others[name]) for name, value in some.items())


def test_every_optimizer_there_is_is_tested():
    assert set(USUAL) == set(optim.__all__) == {name for name, *_ in RESUMED}


@pytest.mark.parametrize(
    ("name", "model_for", "settings"),
    RESUMED,
    ids=[f"{name}-{i}" for i, (name, *_) in enumerate(RESUMED)],
)
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_goes_on_alike_and_by_itself(name, model_for, settings, way):
    model, optimizer = make(name, model_for(), **settings)
    train(model, optimizer, shrinking(optimizer), 3)
    if way == "deepcopy":
        other, copied = copy.deepcopy((model, optimizer))
    else:
        other, copied = pickle.loads(pickle.dumps((model, optimizer)))
    before = copy.deepcopy(other.state_dict())
    train(model, optimizer, shrinking(optimizer), 3, 3)
    assert equal(before, other.state_dict())
    assert not equal(before, model.state_dict())
    train(other, copied, shrinking(copied), 3, 3)
    assert equal(model.state_dict(), other.state_dict())
    assert type(copied) is type(optimizer)


@pytest.mark.parametrize(
    ("name", "model_for", "settings"),
    RESUMED,
    ids=[f"{name}-{i}" for i, (name, *_) in enumerate(RESUMED)],
)
def test_a_resumed_run_is_the_run_that_went_on_to_the_bit(name, model_for, settings):
    model, optimizer = make(name, model_for(), **settings)
    schedule = shrinking(optimizer)
    train(model, optimizer, schedule, 4)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in (model, optimizer, schedule)], file)
    train(model, optimizer, schedule, 5, 4)
    # Made anew with another rate, and with other factors: what was saved decides.
    if name == "LoRAAsOptimizer":
        settings = settings | {"seed": 8}
    again = model_for()
    file.seek(0)
    weights, *states = torch.load(file, weights_only=True)
    again.load_state_dict(weights)
    _, optimizer = make(name, again, lr=0.5, **settings)
    schedule = shrinking(optimizer)
    for part, state in zip((optimizer, schedule), states, strict=True):
        part.load_state_dict(state)
    train(again, optimizer, schedule, 5, 4)
    assert equal(model.state_dict(), again.state_dict())


@each
def test_the_loss_falls(name):
    model, optimizer = make(name)
    first = loss_of(model).item()
    for _ in range(30):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    assert loss_of(model).item() < 0.9 * first


@each
def test_it_is_a_torch_optimizer(name):
    model, optimizer = make(name)
    assert isinstance(optimizer, torch.optim.Optimizer)
    before = copy.deepcopy(model.state_dict())
    optimizer.step()  # without a gradient nothing moves
    assert equal(model.state_dict(), before)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0
    moved = copy.deepcopy(model.state_dict())
    assert not equal(moved, before)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step(closure)
    assert equal(model.state_dict(), moved)


@each
@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, r"(lr=|learning rate: )-1\.0"),
        ({"lr": float("nan")}, ValueError, r"(lr=|learning rate: )nan"),
        ({"weight_decay": -1.0}, ValueError, r"weight_decay( value: |=)-1\.0"),
        ({"momentumm": 1}, TypeError, "momentumm"),
    ],
    ids=str,
)
def test_settings_that_are_refused_leave_the_model_alone(name, settings, error, message):
    model = USUAL[name][0]()
    before = copy.deepcopy(model.state_dict())
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(error, match=message):
        make(name, model, **settings)
    assert equal(model.state_dict(), before)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags


@each
def test_models_and_states_that_are_refused(name):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, not list"):
        make(name, [plain()])
    model, optimizer = make(name)
    before = copy.deepcopy(optimizer.state_dict())
    other = SGD([nn.Parameter(torch.ones(2))], lr=0.1).state_dict()
    with pytest.raises(ValueError, match=r"number of parameter groups|of another optimizer"):
        optimizer.load_state_dict(other)
    assert str(optimizer.state_dict()) == str(before)
    if name.startswith("LoRA") and name != "LoRAAsOptimizer":
        with pytest.raises(ValueError, match="has no parameter that trains"):
            make(name, model.requires_grad_(False))
        with pytest.raises(ValueError, match="no adapted layer"):
            make(name, nn.Linear(3, 3))
        with lorafast.disable_adapter(model), pytest.raises(RuntimeError, match="disabled"):
            make(name, model)
