"""AdapterCheckpoint: transformers' Trainer checkpoints and resumes an adapter without its base.

ScheduleCallback, for schedules alone, is imported from here too.

Imports transformers, which lorafast itself does not.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lorafast.checkpoint import trainer_files
from lorafast.integrations.trainer_schedule import ScheduleCallback, refuse_sharded
from lorafast.models.module_names import adapter_layers, unwrap
from lorafast.runtime import extras

with extras.required("peft"):
    from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments

# Attribute of a model that has the hooks.
_ATTACHED = "_lorafast_checkpoint"


class AdapterCheckpoint(ScheduleCallback):
    """A Trainer callback that makes checkpoints hold the adapter alone.

    A checkpoint is a folder as save_adapter writes it, which load_adapter and PEFT read, with what
    Trainer resumes from beside it, and no base weight. To resume, adapt the same base in the same
    way: the run continues bit for bit. (After a residual init that is so if it gives the same
    factors again; otherwise the weights are those of the run to within one rounding.)

    Args:
        schedule: None, or a schedule as ScheduleCallback takes it: lorafast.schedule.LaMDAFreeze.
        **options: further arguments of the schedule.

    Raises:
        TypeError: schedule is no schedule; or, once Trainer starts, the model is no transformers
            PreTrainedModel.
        ValueError: the model is not adapted, a checkpoint is of another adapter, or as
            ScheduleCallback.
        RuntimeError: the run resumed before the callback saw the model (add_callback, model_init).
        NotImplementedError: Trainer uses FSDP or DeepSpeed.

    Example:
        import tempfile, torch, transformers, lorafast
        from lorafast.integrations.trainer import AdapterCheckpoint

        sizes = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 32}
        config = transformers.LlamaConfig(num_hidden_layers=1, num_attention_heads=2, **sizes)
        model = lorafast.adapt(transformers.LlamaForCausalLM(config), lorafast.LoRA(r=2))
        ids = torch.arange(8)
        with tempfile.TemporaryDirectory() as folder:
            trainer = transformers.Trainer(
                model=model,
                args=transformers.TrainingArguments(
                    folder, max_steps=1, save_steps=1, report_to="none", use_cpu=True
                ),
                train_dataset=[{"input_ids": ids, "labels": ids}],
                callbacks=[AdapterCheckpoint()],
            )
            trainer.train()  # later: trainer.train(resume_from_checkpoint=True)
            lorafast.load_adapter(model, f"{folder}/checkpoint-1")
    """

    def __init__(self, schedule: Any = None, **options: Any) -> None:
        super().__init__(schedule, **options)

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Let the model save adapters and load what it saved."""
        _attach(model)
        super().on_init_end(args, state, control, model=model, **kwargs)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Begin the schedule. A model that Trainer made in train() (model_init) is new here."""
        if _ATTACHED not in vars(model):
            if state.global_step:
                raise RuntimeError(
                    f"the run resumed at step {state.global_step} before AdapterCheckpoint saw its "
                    "model: give the callback to Trainer(callbacks=[...]), not to add_callback, "
                    "and the adapted model as model=, not model_init="
                )
            _attach(model)
        super().on_train_begin(args, state, control, model=model, **kwargs)


def _attach(model: nn.Module) -> None:
    """Register the hooks that load a checkpoint, also on what wraps the model."""
    inner = unwrap(model)
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(
            "model must be a transformers PreTrainedModel adapted by lorafast.adapt, not a "
            f"{type(inner).__name__}: Trainer writes the whole state dict of anything else (and a "
            "PeftModel's adapters by itself)"
        )
    adapter_layers(inner)  # raises if there is none
    refuse_sharded()
    trainer_files.register_hooks(model)
    vars(model)[_ATTACHED] = True
