"""TRL's trainers on adapted models, and on PEFT models whose layers run on lorafast."""

import warnings

import pytest
import torch
from helpers.trainer_runs import IDS, logits

import lorafast
from lorafast import DoRA, LaMDA, LoRA, PiSSA, VeRA
from lorafast.integrations import AccelerateCallback
from lorafast.integrations.trainer import AdapterCheckpoint, ScheduleCallback
from lorafast.schedule import LaMDAFreeze

pytest.importorskip("trl", reason="TRL is not installed")
import peft
from helpers import trl_runs
from helpers.trl_runs import logged

from lorafast.integrations.peft_lamda import LamdaConfig

pytestmark = [
    pytest.mark.peft,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

ADAPTERS = [LoRA(r=4), DoRA(r=4), VeRA(r=8), LaMDA(r=4), LoRA(r=4, init=PiSSA())]
SGD = {"optim": "sgd", "learning_rate": 1.0}


def adapted(adapter, *targets, **options):
    return lorafast.adapt(trl_runs.model(), adapter, *targets, seed=1, **options)


def peft_config(**fields):
    fields = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | fields
    return peft.LoraConfig(**fields)


def schedule_for(adapter):
    return [ScheduleCallback(LaMDAFreeze)] if isinstance(adapter, LaMDA) else []


def test_sft_trains_as_it_does_peft_models(tmp_path):
    theirs = peft.get_peft_model(trl_runs.model(), peft_config())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    theirs.save_pretrained(tmp_path / "a")
    ours = lorafast.load_adapter(trl_runs.model(), tmp_path / "a", trainable=True)
    runs = [trl_runs.sft(model, tmp_path, SGD) for model in (theirs, ours)]
    lorafast.accelerate(
        accelerated := peft.PeftModel.from_pretrained(
            trl_runs.model(), tmp_path / "a", is_trainable=True
        )
    )
    runs.append(trl_runs.sft(accelerated, tmp_path, SGD))
    for run in runs:
        run.train()
    want = logged(runs[0])
    assert want[-1] < want[0]
    for run in runs[1:]:
        torch.testing.assert_close(logged(run), want)


def test_a_callback_accelerates_the_model_that_the_trainer_makes(tmp_path):
    runs = []
    for callbacks in ([], [AccelerateCallback()]):
        torch.manual_seed(0)
        runs.append(
            trl_runs.sft(
                trl_runs.model(), tmp_path, SGD, peft_config=peft_config(), callbacks=callbacks
            )
        )
    assert len(callbacks[0].report.taken) == 14
    assert not callbacks[0].report.left
    for run in runs:
        torch.manual_seed(0)
        run.train()
    torch.testing.assert_close(logged(runs[1]), logged(runs[0]))


@pytest.mark.parametrize("adapter", ADAPTERS, ids=repr)
def test_sft_saves_the_adapter_it_trained(adapter, tmp_path):
    model = adapted(adapter)
    before = logits(model)
    trainer = trl_runs.sft(model, tmp_path, callbacks=schedule_for(adapter))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*got no gradient|.*without a schedule")
        trainer.train()
    trainer.save_model(tmp_path / "saved")
    assert not torch.equal(logits(model), before)
    again = lorafast.load_adapter(trl_runs.model(), tmp_path / "saved")
    torch.testing.assert_close(logits(again), logits(model))


@pytest.mark.parametrize("callback", [AdapterCheckpoint, lambda: ScheduleCallback(None)])
def test_an_adapted_head_is_named_under_the_fused_loss(callback, tmp_path):
    model = adapted(LoRA(r=4), ["q_proj", "lm_head"])
    trainer = trl_runs.sft(model, tmp_path, callbacks=[callback()])
    with pytest.warns(UserWarning, match="got no gradient in the first step: lm_head. Unless"):
        trainer.train()
    assert not model.lm_head.lora_B.any()
    theirs = peft.get_peft_model(trl_runs.model(), peft_config(target_modules=["lm_head"]))
    lorafast.accelerate(theirs)
    with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
        trl_runs.sft(theirs, tmp_path)


def policies():
    """Models with dropout: ours, and PEFT's on our layers."""
    accelerated = peft.get_peft_model(trl_runs.model(), peft_config(lora_dropout=0.5))
    lorafast.accelerate(accelerated)
    return [adapted(LoRA(r=4, dropout=0.5)), adapted(DoRA(r=4, dropout=0.5)), accelerated]


@pytest.mark.parametrize("which", [0, 1, 2], ids=["LoRA", "DoRA", "accelerated"])
def test_dpo_and_grpo_turn_dropout_off(which, tmp_path):
    for make in (trl_runs.dpo, trl_runs.grpo):
        model = policies()[which]
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_()
            assert not torch.equal(model.train()(input_ids=IDS)[0], model(input_ids=IDS)[0])
            more = {} if which == 2 or make is trl_runs.grpo else reference_of(model)
            make(model, tmp_path, **more)
            assert torch.equal(model.train()(input_ids=IDS)[0], model(input_ids=IDS)[0])


def reference_of(model):
    return {"ref_model": lorafast.reference_model(model)}


@pytest.mark.parametrize("adapter", ADAPTERS, ids=repr)
def test_dpo_with_the_reference_model_begins_at_no_margin(adapter, tmp_path):
    """And goes on as with log-probabilities that are computed before the first step."""
    model = adapted(adapter)
    reference = lorafast.reference_model(model)
    want = logits(reference)
    given = trl_runs.dpo(model, tmp_path, ref_model=reference, callbacks=schedule_for(adapter))
    given.train()
    assert given.ref_model is reference
    # The residual of some inits and their delta add up to the base weight but for a rounding.
    torch.testing.assert_close(logged(given)[0], torch.tensor(2.0).log())
    assert logged(given, "rewards/margins")[1:].abs().min() > 0
    assert torch.equal(logits(reference), want)
    other = adapted(adapter)
    computed = {"precompute_ref_log_probs": True}
    before = trl_runs.dpo(other, tmp_path, computed, callbacks=schedule_for(adapter))
    before.train()
    assert before.ref_model is None
    torch.testing.assert_close(logged(before), logged(given))


def test_dpo_without_the_reference_loads_the_base_again(tmp_path):
    trl_runs.model().save_pretrained(tmp_path / "base")
    losses = []
    for given in (True, False):
        model = lorafast.adapt(
            type(trl_runs.model()).from_pretrained(tmp_path / "base"), LoRA(r=4), seed=1
        )
        trainer = trl_runs.dpo(model, tmp_path, **(reference_of(model) if given else {}))
        weight = trainer.ref_model.model.embed_tokens.weight
        assert (weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()) is given
        trainer.train()
        losses.append(logged(trainer))
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("whose", ["peft_config", "PeftModel"])
def test_dpo_trains_accelerated_layers_as_pefts(whose, tmp_path):
    losses = []
    for accelerated in (False, True):
        torch.manual_seed(3)
        if whose == "peft_config":
            trainer = trl_runs.dpo(trl_runs.model(), tmp_path, SGD, peft_config=peft_config())
            model = trainer.model
        else:
            model = peft.get_peft_model(trl_runs.model(), peft_config())
        if accelerated:
            assert str(lorafast.accelerate(model)) == "14 of 14 PEFT layers run on lorafast"
        if whose == "PeftModel":
            trainer = trl_runs.dpo(model, tmp_path, SGD)
        trainer.train()
        losses.append(logged(trainer))
    assert losses[0][-1] != losses[0][0]
    torch.testing.assert_close(*losses)


def test_dpo_freezes_a_lamda_of_its_peft_config(tmp_path):
    config = LamdaConfig(r=4, lamda_init="zero", target_modules="all-linear", task_type="CAUSAL_LM")
    callback = ScheduleCallback(LaMDAFreeze, fraction=0.5)
    trainer = trl_runs.dpo(trl_runs.model(), tmp_path, peft_config=config, callbacks=[callback])
    trainer.train()
    assert {layer.frozen_columns for layer in callback.schedule.layers} == {4}
    assert len(callback.schedule.layers) == 14


def test_a_reference_made_after_sft_is_the_base(tmp_path):
    model = adapted(LoRA(r=4))
    trl_runs.sft(model, tmp_path).train()
    reference = lorafast.reference_model(model)
    assert torch.equal(logits(reference), logits(trl_runs.model()))
    assert not torch.equal(logits(reference), logits(model))
    trainer = trl_runs.dpo(model, tmp_path, ref_model=reference)
    trainer.train()
    assert torch.equal(logits(reference), logits(trl_runs.model()))
    assert logged(trainer, "rewards/margins")[0] != 0


@pytest.mark.slow
def test_grpo_trains(tmp_path):
    model = adapted(LoRA(r=4))
    trainer = trl_runs.grpo(model, tmp_path)
    trainer.train()
    assert any(layer.lora_B.any() for layer in model.modules() if hasattr(layer, "lora_B"))
