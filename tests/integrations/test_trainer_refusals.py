"""AdapterCheckpoint refuses what it cannot checkpoint or resume, and changes nothing."""

import copy
from types import SimpleNamespace

import peft
import pytest
import torch
from helpers.trainer_runs import (
    HALF,
    STEPS,
    Stop,
    adapted,
    assert_same,
    base,
    losses,
    trainer_of,
)
from torch import nn

import lorafast
from lorafast import DoRA, LaMDA, LoRA
from lorafast.integrations import trainer_schedule
from lorafast.integrations.trainer import AdapterCheckpoint
from lorafast.schedule import LaMDAFreeze

pytestmark = pytest.mark.peft


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            {"adapter": LoRA(r=4, alpha=16)},
            r"layers\.0\.mlp\.down_proj is LoRA, scaling 2\.0, .* there and LoRA, scaling 4\.0",
        ),
        ({"adapter": DoRA(r=4)}, "down_proj is LoRA, .* there and DoRA"),
        (
            {"adapter": LoRA(r=5, alpha=10)},
            r"lora_A is a float32 tensor \(4, 32\) there and a float32 tensor \(5, 32\) in",
        ),
        ({"target_modules": ["q_proj"]}, r"down_proj is LoRA, .* there and absent"),
        ({"modules_to_save": ["lm_head"]}, "lm_head.weight is absent there"),
        ({"bias": "all"}, "bias is absent there"),
        ({"adapter_dtype": torch.float64}, "is a float32 tensor .* there and a float64 tensor"),
    ],
    ids=str,
)
def test_a_checkpoint_of_another_adapter_is_refused_and_changes_nothing(options, told, tmp_path):
    trainer_of(adapted(LoRA(r=4)), tmp_path, AdapterCheckpoint(), Stop()).train()
    model = adapted(**{"adapter": LoRA(r=4)} | options)
    want = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=f"the checkpoint is of another adapter than the model's: .*{told}"
    ):
        trainer_of(model, tmp_path, AdapterCheckpoint()).train(resume_from_checkpoint=True)
    assert_same(model, SimpleNamespace(state_dict=lambda: want))


def test_what_cannot_be_checkpointed_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="LlamaForCausalLM has no adapted layer"):
        trainer_of(base(), tmp_path, AdapterCheckpoint())
    with pytest.raises(
        TypeError, match=r"model must be a transformers PreTrainedModel .* not a Sequential"
    ):
        trainer_of(nn.Sequential(lorafast.Linear(2, 2)), tmp_path, AdapterCheckpoint())
    with pytest.raises(TypeError, match="not a PeftModelForCausalLM"):
        trainer_of(
            peft.get_peft_model(base(), peft.LoraConfig(task_type="CAUSAL_LM")),
            tmp_path,
            AdapterCheckpoint(),
        )
    with pytest.raises(TypeError, match="schedule=3 must be"):
        AdapterCheckpoint(schedule=3)
    with pytest.raises(ValueError, match="schedule is of another model"):
        trainer_of(adapted(), tmp_path, AdapterCheckpoint(LaMDAFreeze(adapted(LaMDA()), STEPS)))
    for name in ("fsdp_plugin", "deepspeed_plugin"):
        monkeypatch.setattr(
            trainer_schedule,
            "AcceleratorState",
            lambda name=name: SimpleNamespace(**{name: object()}),
        )
        with pytest.raises(NotImplementedError, match=name):
            AdapterCheckpoint().on_init_end(None, None, None, model=adapted())


def test_a_callback_that_comes_late_saves_and_refuses_to_have_resumed(tmp_path):
    trainer = trainer_of(adapted(), tmp_path)
    trainer.add_callback(AdapterCheckpoint())
    trainer.train()
    assert (tmp_path / f"checkpoint-{HALF}" / "adapter_config.json").exists()
    late = trainer_of(adapted(), tmp_path)
    late.add_callback(AdapterCheckpoint())
    with pytest.raises(
        RuntimeError, match="the run resumed at step 3 before AdapterCheckpoint saw its model"
    ):
        late.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{HALF}"))
    trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{HALF}"))
    assert len(losses(trainer)) == STEPS
