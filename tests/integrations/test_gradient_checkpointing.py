"""Gradient checkpointing, switched on before adapt, after it or by Trainer, changes no bit."""

import pytest
import torch
from helpers.trainer_runs import adapted, assert_same, base, losses, trainer_of

import lorafast
from lorafast import DoRA, LaMDA, LoRA, VeRA
from lorafast.schedule import LaMDAFreeze

pytestmark = [pytest.mark.peft, pytest.mark.filterwarnings("ignore::FutureWarning")]

ADAPTERS = [LoRA(r=4, dropout=0.3), DoRA(r=4, dropout=0.3), LaMDA(r=4, dropout=0.3), VeRA(r=8)]


def enable(model, reentrant):
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        # Reentrant checkpoints give no gradient where no input has one.
        model.enable_input_require_grads()
    return model


def before_adapt(adapter, reentrant):
    return lorafast.adapt(enable(base(), reentrant), adapter, seed=1), {}


def after_adapt(adapter, reentrant):
    return enable(adapted(adapter), reentrant), {}


def by_trainer(adapter, reentrant):
    model = adapted(adapter)
    if reentrant:
        model.enable_input_require_grads()
    options = {"use_reentrant": reentrant}
    return model, {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": options}


def trained(model, folder, **arguments):
    if isinstance(next(m.adapter for m in model.modules() if hasattr(m, "adapter")), LaMDA):
        LaMDAFreeze(model, total_steps=9)
    trainer = trainer_of(model, folder, save_strategy="no", max_steps=3, **arguments)
    trainer.train()
    assert len(losses(trainer)) == 3
    return losses(trainer)


@pytest.mark.parametrize("order", [before_adapt, after_adapt, by_trainer], ids=lambda o: o.__name__)
@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize(
    "adapter", [ADAPTERS[0], *(pytest.param(a, marks=pytest.mark.slow) for a in ADAPTERS[1:])],
    ids=repr,
)  # fmt: skip
def test_a_checkpointed_run_is_the_plain_one(adapter, reentrant, order, tmp_path):
    plain = adapted(adapter)
    want = trained(plain, tmp_path)
    model, arguments = order(adapter, reentrant)
    assert trained(model, tmp_path, **arguments) == want
    assert model.is_gradient_checkpointing
    assert_same(model, plain)
    fresh = adapted(adapter).state_dict()
    assert not all(torch.equal(tensor, fresh[name]) for name, tensor in model.state_dict().items())
