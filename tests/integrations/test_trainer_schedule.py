"""ScheduleCallback: Trainer steps schedules, saves their state, and resumes them to the bit."""

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers.trainer_runs import HALF, STEPS, Stop, adapted, assert_same, base, losses, trainer_of
from torch import nn
from transformers import LlamaForCausalLM, TrainerCallback

import lorafast
from lorafast import AdaLoRA, AFLoRA, LaMDA, LoRA, schedule
from lorafast.integrations.trainer import AdapterCheckpoint, ScheduleCallback

pytestmark = pytest.mark.peft

# By class: how a model for it is made, the callback's class, and the schedule's options.
SCHEDULES = {
    "LaMDAFreeze": (
        lambda: adapted(LaMDA(r=4, dropout=0.3)), AdapterCheckpoint, {"fraction": 0.9},
    ),
    "AdaLoRA": (
        lambda: adapted(AdaLoRA(r=4, target_r=2, dropout=0.3)), ScheduleCallback,
        {"tinit": 1, "tfinal": 1},
    ),
    "AFLoRA": (
        lambda: adapted(AFLoRA(r=4, dropout=0.3)), ScheduleCallback,
        {"warmup": 1, "final": 1, "deltaT": 1},
    ),
    "LISA": (base, ScheduleCallback, {"active": 1, "every": 1}),
}  # fmt: skip
each = pytest.mark.parametrize("name", SCHEDULES)


def prepared(name, **more):
    """A model anew, and a callback with the schedule's class."""
    model_for, callback, options = SCHEDULES[name]
    return model_for(), callback(getattr(schedule, name), **options | more)


def equal(first, second):
    """Whether two states are equal, of which every tensor is compared bit for bit."""
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[k], second[k]) for k in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(equal, first, second))
    return first == second


def assert_equal_states(first, second):
    assert equal(first.state_dict(), second.state_dict())


class Gradients(TrainerCallback):
    """Notes the gradients of the first step as the optimizer gets them."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not state.global_step:
            self.taken = {
                name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
            }


@each
@pytest.mark.parametrize("arguments", [{}, {"gradient_accumulation_steps": 2}], ids=str)
def test_a_resumed_run_is_the_one_that_never_stopped(name, arguments, tmp_path):
    straight, callback = prepared(name)
    whole = trainer_of(straight, tmp_path / "a", callback, save_strategy="no", **arguments)
    whole.train()
    assert callback.schedule.last_step == STEPS
    model, first = prepared(name)
    trainer_of(model, tmp_path / "b", first, Stop(), **arguments).train()
    model, resumed = prepared(name)
    torch.rand(5)
    again = trainer_of(model, tmp_path / "c", resumed, **arguments)
    again.train(resume_from_checkpoint=str(tmp_path / "b" / f"checkpoint-{HALF}"))
    assert losses(again) == losses(whole)
    assert len(losses(again)) == STEPS
    assert_same(model, straight)
    assert [p.requires_grad for p in model.parameters()] == [
        p.requires_grad for p in straight.parameters()
    ]
    assert_equal_states(resumed.schedule, callback.schedule)
    assert_equal_states(again.optimizer, whole.optimizer)


@each
def test_a_checkpoint_holds_the_state_and_the_optimizer_does_not(name, tmp_path):
    model, callback = prepared(name)
    trainer = trainer_of(model, tmp_path, callback, Stop())
    trainer.train()
    saved = torch.load(tmp_path / f"checkpoint-{HALF}" / "optimizer.pt", weights_only=True)
    told = saved["param_groups"][0]["lorafast_schedule"]
    assert (told["name"], told["state"]["last_step"]) == (name, HALF)
    assert "lorafast_schedule" not in trainer.optimizer.param_groups[0]
    assert "lorafast_schedule" not in trainer.optimizer.state_dict()["param_groups"][0]


@pytest.mark.parametrize("name", ["LaMDAFreeze", "AFLoRA", "LISA"])
def test_what_one_run_froze_trains_in_the_next(name, tmp_path):
    model, callback = prepared(name)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    trainer = trainer_of(model, tmp_path / "a", callback, save_strategy="no")
    trainer.train()
    fresh = SCHEDULES[name][1](getattr(schedule, name), **SCHEDULES[name][2])
    again = trainer_of(model, tmp_path / "b", fresh, save_strategy="no")
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    again.train()
    # The same Trainer once more, whose optimizer exists already.
    trainer.train()
    assert callback.schedule.last_step == STEPS


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("max_grad_norm", [0.0, 1e-3])
def test_the_penalty_reaches_the_gradient_before_it_is_clipped(
    accumulated, max_grad_norm, tmp_path
):
    def made():
        return lorafast.adapt(base().double(), AdaLoRA(r=4, target_r=2), seed=1)

    model, gradients, batches = made(), Gradients(), []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: batches.append(kwargs["input_ids"]), with_kwargs=True
    )
    callback = AdapterCheckpoint(schedule.AdaLoRA, orth_reg_weight=0.7)
    trainer_of(
        model, tmp_path, callback, gradients, max_steps=2, save_strategy="no",
        gradient_accumulation_steps=accumulated, max_grad_norm=max_grad_norm,
    ).train()  # fmt: skip
    want = made().train()
    penalty = schedule.AdaLoRA(want, total_steps=2, orth_reg_weight=0.7).penalty()
    loss = sum(want(input_ids=ids, labels=ids).loss for ids in batches[:accumulated]) / accumulated
    (loss + penalty).backward()
    if max_grad_norm:
        nn.utils.clip_grad_norm_(want.parameters(), max_grad_norm)
    expected = {name: p.grad for name, p in want.named_parameters() if p.grad is not None}
    torch.testing.assert_close(gradients.taken, expected, rtol=1e-7, atol=1e-12)


def test_the_penalty_is_scaled_as_the_loss_is():
    layers = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    model = lorafast.adapt(layers, AdaLoRA(r=3, target_r=2), seed=1)
    callback = ScheduleCallback(schedule.AdaLoRA(model, total_steps=5))
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    callback.on_step_begin(None, None, None, optimizer=SimpleNamespace(scaler=scaler))
    found = [p.grad / 64 for p in callback.schedule.parameters() if p.grad is not None]
    model.zero_grad()
    callback.schedule.penalty().backward()
    want = [p.grad for p in callback.schedule.parameters() if p.grad is not None]
    assert len(want) == 4
    torch.testing.assert_close(found, want)


def test_total_steps_are_trainers(tmp_path):
    for steps in (
        {"max_steps": 4},
        {"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 4},
    ):
        callback = AdapterCheckpoint(schedule.LaMDAFreeze)
        trainer_of(adapted(LaMDA(r=4)), tmp_path, callback, save_strategy="no", **steps).train()
        assert callback.schedule.total_steps == 4
        assert callback.schedule.last_step == 4


@pytest.mark.parametrize("kind", ["options", "function", "instance"])
def test_a_schedule_of_another_length_warns(kind, tmp_path):
    model = adapted(LaMDA(r=4))
    given = {
        "options": lambda: AdapterCheckpoint(schedule.LaMDAFreeze, total_steps=STEPS + 1),
        "function": lambda: AdapterCheckpoint(lambda m: schedule.LaMDAFreeze(m, STEPS + 1)),
        "instance": lambda: AdapterCheckpoint(schedule.LaMDAFreeze(model, STEPS + 1)),
    }[kind]()
    trainer = trainer_of(model, tmp_path, given, save_strategy="no")
    with pytest.warns(
        UserWarning, match="is planned for total_steps=7, and Trainer makes 6 steps"
    ) as told:
        trainer.train()
    assert len(told) == 1


def test_a_run_that_resumes_keeps_its_settings_and_says_so(tmp_path):
    model, callback = prepared("LaMDAFreeze")
    trainer_of(model, tmp_path, callback, Stop()).train()
    model, callback = prepared("LaMDAFreeze", group=3)
    trainer = trainer_of(model, tmp_path, callback)
    with pytest.warns(
        UserWarning, match="LaMDAFreeze resumes as it was saved, with group=1 and not 3"
    ):
        trainer.train(resume_from_checkpoint=True)
    assert callback.schedule.group == 1


def test_a_lamda_model_without_a_schedule_warns_once(tmp_path):
    model = adapted(LaMDA(r=4))
    trainer = trainer_of(model, tmp_path, AdapterCheckpoint(), save_strategy="no")
    with pytest.warns(UserWarning, match="14 LaMDA adapters train without a schedule") as told:
        trainer.train()
    assert len(told) == 1
    trainer.train()


def unscheduled(train):
    """Return what a run warns of LaMDA adapters without a schedule."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        train()
    return [str(warning.message) for warning in told if "LaMDA adapters" in str(warning.message)]


@pytest.mark.parametrize("saves", ["no", "steps"])
def test_without_any_callback_it_warns_once_too(saves, tmp_path):
    model = adapted(LaMDA(r=4))
    trainer = trainer_of(model, tmp_path, save_strategy=saves, save_steps=2)
    (message,) = unscheduled(trainer.train)
    assert message.startswith("14 LaMDA adapters train without a schedule")
    assert "ScheduleCallback(lorafast.schedule.LaMDAFreeze)" in message
    assert unscheduled(trainer.train) == []


def test_a_loaded_adapter_that_trains_warns_too(tmp_path):
    lorafast.save_adapter(adapted(LaMDA(r=4)), tmp_path / "a")
    again = lorafast.load_adapter(base(), tmp_path / "a", trainable=True)
    assert len(unscheduled(trainer_of(again, tmp_path / "b").train)) == 1


def test_a_run_with_a_schedule_or_another_method_is_told_nothing(tmp_path):
    for adapter, callbacks in (
        (LaMDA(r=4), [ScheduleCallback(schedule.LaMDAFreeze)]),
        (LoRA(r=4), []),
    ):
        trainer = trainer_of(adapted(adapter), tmp_path / type(adapter).__name__, *callbacks)
        assert unscheduled(trainer.train) == []
    model = adapted(LaMDA(r=4))
    schedule.LaMDAFreeze(model, STEPS)
    assert unscheduled(trainer_of(model, tmp_path / "own").train) == []


def test_a_schedule_that_the_user_steps_is_one(tmp_path):
    model = adapted(LaMDA(r=4))
    planned = schedule.LaMDAFreeze(model, STEPS)
    trainer_of(model, tmp_path, AdapterCheckpoint(), save_strategy="no").train()
    assert planned.last_step == 0


class FusedLoss(LlamaForCausalLM):
    """Reads the weight of its head instead of calling it."""

    def forward(self, input_ids, labels=None, **kwargs):
        hidden = self.model(input_ids).last_hidden_state
        logits = F.linear(hidden, self.lm_head.weight)
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten())}


@pytest.mark.parametrize("callback", [AdapterCheckpoint, lambda: ScheduleCallback(None)])
def test_an_adapter_without_a_gradient_is_named_once(callback, tmp_path):
    model = FusedLoss(base().config)
    lorafast.adapt(model, LoRA(r=2), target_modules=["q_proj", "lm_head"])
    trainer = trainer_of(model, tmp_path, callback(), save_strategy="no")
    with pytest.warns(
        UserWarning, match="adapter of 1 layer got no gradient in the first step: lm_head"
    ) as told:
        trainer.train()
    assert len(told) == 1
    trainer.train()


@pytest.mark.parametrize(
    ("given", "options", "kind", "told"),
    [
        (3, {}, TypeError, "schedule=3 must be a class of"),
        (torch.optim.lr_scheduler.ConstantLR, {"total": 1}, TypeError, "cannot be called with"),
        (schedule.LaMDAFreeze, {"fractoin": 0.3}, TypeError, "'fractoin'"),
        (schedule.LISA, {"total_steps": 5}, TypeError, "'total_steps'"),
    ],
)
def test_what_is_no_schedule_is_refused(given, options, kind, told):
    for callback in (ScheduleCallback, AdapterCheckpoint):
        with pytest.raises(kind, match=told):
            callback(given, **options)


def test_a_schedule_that_does_not_fit_is_refused(tmp_path):
    model = adapted(LaMDA(r=4))
    planned = schedule.LaMDAFreeze(model, STEPS)
    with pytest.raises(TypeError, match="fraction: a schedule that is made already takes no"):
        ScheduleCallback(planned, fraction=0.5)
    planned.step()
    with pytest.raises(ValueError, match="has made 1 steps already"):
        ScheduleCallback(planned)
    trainer = trainer_of(model, tmp_path, ScheduleCallback(lambda model: model))
    with pytest.raises(TypeError, match="must return a schedule of lorafast"):
        trainer.train()
    model = base()
    trainer = trainer_of(model, tmp_path, ScheduleCallback(schedule.LISA(model, active=1)))
    with pytest.raises(ValueError, match=r"the optimizer lacks .* Parameters that LISA lets train"):
        trainer.train()


@pytest.mark.parametrize("wrong", ["without", "another", "later"])
def test_a_checkpoint_without_the_state_is_refused(wrong, tmp_path):
    model, callback = prepared("AFLoRA")
    trainer_of(model, tmp_path, callback, Stop()).train()
    path = tmp_path / f"checkpoint-{HALF}" / "optimizer.pt"
    saved = torch.load(path)
    group = saved["param_groups"][0]
    if wrong == "without":
        del group["lorafast_schedule"]
    elif wrong == "another":
        group["lorafast_schedule"]["name"] = "LISA"
    else:
        group["lorafast_schedule"]["state"]["last_step"] = 2
    torch.save(saved, path)
    told = {
        "without": "holds no schedule, not the state of a AFLoRA",
        "another": "holds LISA, not the state of a AFLoRA",
        "later": "at step 3 holds a AFLoRA after 2 steps",
    }[wrong]
    model, callback = prepared("AFLoRA")
    trainer = trainer_of(model, tmp_path, callback)
    with pytest.raises(ValueError, match=told):
        trainer.train(resume_from_checkpoint=True)


def test_a_lamda_checkpoint_of_an_earlier_version_resumes(tmp_path):
    model, callback = prepared("LaMDAFreeze")
    whole = trainer_of(model, tmp_path, callback)
    whole.train()
    path = tmp_path / f"checkpoint-{HALF}" / "optimizer.pt"
    saved = torch.load(path)
    del saved["param_groups"][0]["lorafast_schedule"]
    torch.save(saved, path)
    want = copy.deepcopy(model.state_dict())
    model, callback = prepared("LaMDAFreeze")
    trainer_of(model, tmp_path, callback).train(resume_from_checkpoint=str(path.parent))
    assert_same(model, SimpleNamespace(state_dict=lambda: want))
