"""LaMDA adapters that train without a schedule warn at the first optimizer step, in every loop."""

import copy
import gc
import pickle
import threading
import warnings
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrize

import lorafast
from lorafast import LaMDA, LoRA
from lorafast.nn import unscheduled
from lorafast.schedule import LaMDAFreeze

X = torch.arange(24.0).reshape(3, 8) / 24


@pytest.fixture(autouse=True)
def nothing_waits(monkeypatch):
    """Leave out what other tests have left."""
    monkeypatch.setattr(unscheduled, "_waiting", weakref.WeakSet())


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))


def adapted(adapter=None):
    return lorafast.adapt(plain(), adapter or LaMDA(r=2), seed=1)


def optimizer_of(model, kind=torch.optim.AdamW):
    return kind([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def told(*calls):
    """What each call warns of LaMDA adapters, one after the other."""
    messages = []
    for call in calls:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
        found = [warning for warning in caught if "LaMDA adapter" in str(warning.message)]
        assert all(warning.filename == __file__ for warning in found)
        messages.append([str(warning.message) for warning in found])
    return messages


def stepping(model, optimizer=None):
    """A function that makes a training step."""
    optimizer = optimizer or optimizer_of(model)

    def step():
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()

    return step


def closure_of(model, optimizer):
    def closure():
        optimizer.zero_grad()
        loss = model(X).square().mean()
        loss.backward()
        return loss

    return closure


def counts(*calls):
    return [len(messages) for messages in told(*calls)]


def test_a_plain_loop_warns_once():
    step = stepping(adapted())
    first, second = told(step, step)
    assert first[0].startswith("2 LaMDA adapters train without a schedule")
    assert "lorafast.schedule.LaMDAFreeze(model, total_steps)" in first[0]
    assert "ScheduleCallback(lorafast.schedule.LaMDAFreeze)" in first[0]
    assert len(first) == 1
    assert second == []
    assert len(unscheduled._waiting) == 0


def test_a_single_layer_warns():
    layer = lorafast.Linear(8, 8, adapter=LaMDA(r=2))
    assert told(stepping(layer))[0][0].startswith("1 LaMDA adapter trains without a schedule")


@pytest.mark.parametrize("kind", ["SGD", "LBFGS", "LoRAPlus", "GradScaler"])
def test_every_optimizer_warns(kind):
    model = adapted()
    if kind == "LBFGS":
        optimizer = optimizer_of(model, torch.optim.LBFGS)
        closure = closure_of(model, optimizer)
        assert counts(lambda: optimizer.step(closure)) == [1]
        return
    if kind == "GradScaler":
        scaler, optimizer = torch.amp.GradScaler("cpu"), optimizer_of(model)
        scaler.scale(model(X).square().mean()).backward()
        with pytest.warns(UserWarning, match="2 LaMDA adapters train without a schedule"):
            scaler.step(optimizer)
        return
    if kind == "SGD":
        optimizer = optimizer_of(model, torch.optim.SGD)
    else:
        optimizer = getattr(lorafast.optim, kind)(model, lr=1e-2)
    assert counts(*[stepping(model, optimizer)] * 2) == [1, 0]


@pytest.mark.compile
def test_a_compiled_step_warns():
    model = adapted()
    optimizer = optimizer_of(model)
    step = torch.compile(optimizer.step, backend="eager")
    model(X).square().mean().backward()
    with pytest.warns(UserWarning, match="2 LaMDA adapters train without a schedule") as caught:
        step()
    assert sum("LaMDA" in str(warning.message) for warning in caught) == 1


def schedule_first(model):
    LaMDAFreeze(model, total_steps=4)
    return stepping(model)


def optimizer_first(model):
    step = stepping(model)
    LaMDAFreeze(model, total_steps=4)
    return step


def backward_before(model):
    step = stepping(model)
    model(X).square().mean().backward()
    return schedule_after(model, step)


def schedule_after(model, step):
    LaMDAFreeze(model, total_steps=4)
    return step


def steps_without_gradients(model):
    """As some do before the first step of a learning rate's schedule."""
    optimizer = optimizer_of(model)
    optimizer.step()
    return schedule_after(model, stepping(model, optimizer))


def resumed(model):
    state = LaMDAFreeze(adapted(), total_steps=4).state_dict() | {"last_step": 1}
    LaMDAFreeze(model, total_steps=9).load_state_dict(state)
    return stepping(model)


def copied(model):
    LaMDAFreeze(model, total_steps=4)
    return stepping(copy.deepcopy(model))


def b_is_frozen(model):
    for layer in model:
        layer.lora_B.requires_grad_(False)
    return stepping(model)


def cores_alone(model):
    cores = [layer.lora_core for layer in model]
    return stepping(model, torch.optim.SGD(cores, lr=1e-2))


SILENT = (
    schedule_first, optimizer_first, backward_before, steps_without_gradients, resumed, copied,
    b_is_frozen, cores_alone,
)  # fmt: skip


@pytest.mark.parametrize("prepare", SILENT, ids=lambda f: f.__name__)
def test_a_schedule_before_the_first_step_is_silent(prepare):
    model = adapted()
    step = []
    assert counts(lambda: step.append(prepare(model)), lambda: [step[0]() for _ in range(3)]) == [
        0, 0,
    ]  # fmt: skip


def test_other_methods_are_silent_and_wait_for_nothing():
    for adapter in (LoRA(r=2), lorafast.DoRA(r=2), lorafast.AdaLoRA(r=2, target_r=1)):
        assert counts(stepping(adapted(adapter))) == [0]
    assert len(unscheduled._waiting) == 0


def test_each_model_warns_once():
    first, second = adapted(), adapted()
    planned = adapted()
    LaMDAFreeze(planned, total_steps=4)
    steps = [stepping(model) for model in (first, planned, second, first, second)]
    assert counts(*steps) == [1, 0, 1, 0, 0]


def test_one_optimizer_of_two_models_warns_once():
    both = nn.ModuleList([adapted(), adapted()])
    optimizer = optimizer_of(both)
    (messages,) = told(stepping(nn.Sequential(both[0], nn.Linear(4, 8), both[1]), optimizer))
    assert [message[:8] for message in messages] == ["4 LaMDA "]


def test_another_models_optimizer_says_nothing():
    waiting = adapted()
    waiting(X).sum().backward()
    assert counts(stepping(plain())) == [0]
    assert counts(stepping(waiting)) == [1]


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_warns_for_itself(way):
    model = adapted()
    other = way(model)
    assert counts(stepping(model), stepping(other), stepping(model)) == [1, 1, 0]


def test_a_loaded_adapter_that_trains_warns(tmp_path):
    lorafast.save_adapter(adapted(), tmp_path)
    served = lorafast.load_adapter(plain(), tmp_path)
    assert len(unscheduled._waiting) > 0
    assert counts(stepping(lorafast.load_adapter(plain(), tmp_path, trainable=True))) == [1]
    assert not served[0].lora_B.requires_grad


def test_a_dropped_model_is_kept_by_nothing():
    model = adapted()
    gone = weakref.ref(model[0])
    stepping(model)
    assert len(unscheduled._waiting) == 2
    del model
    gc.collect()
    assert gone() is None
    assert len(unscheduled._waiting) == 0


def test_a_parametrized_factor_is_passed_over():
    class Twice(nn.Module):
        def forward(self, B):
            return 2 * B

    model = adapted()
    for layer in model:
        parametrize.register_parametrization(layer, "lora_B", Twice())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stepping(model)()


def test_threads_that_train_and_make_models():
    failures = []

    def train():
        try:
            for _ in range(20):
                stepping(adapted())()
        except Exception as failure:
            failures.append(failure)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        threads = [threading.Thread(target=train) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []
    gc.collect()
    assert len(unscheduled._waiting) == 0


@pytest.mark.distributed
def test_fsdp2_warns(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 's'}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        bare, planned = adapted(LaMDA(r=2, init="zero")), adapted(LaMDA(r=2, init="zero"))
        LaMDAFreeze(planned, total_steps=4)
        steps = [stepping(fully_shard(model, mesh=mesh)) for model in (bare, planned)]
        assert counts(steps[0], steps[0], steps[1]) == [1, 0, 0]
    finally:
        dist.destroy_process_group()
