"""AdapterCheckpoint: transformers' Trainer checkpoints and resumes an adapter without its base.

Imports transformers, which lorafast itself does not.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lorafast.checkpoint import trainer_files
from lorafast.models.module_names import adapter_layers, unwrap
from lorafast.runtime import extras

with extras.required("peft"):
    from accelerate.state import AcceleratorState
    from transformers import (
        PreTrainedModel,
        TrainerCallback,
        TrainerControl,
        TrainerState,
        TrainingArguments,
    )

# Attribute of a model that has the hooks.
_ATTACHED = "_lorafast_checkpoint"


class AdapterCheckpoint(TrainerCallback):
    """A Trainer callback that makes checkpoints hold the adapter alone.

    A checkpoint is a folder as save_adapter writes it, which load_adapter and PEFT read, with what
    Trainer resumes from beside it, and no base weight. To resume, adapt the same base in the same
    way: the run continues bit for bit. (After a residual init that is so if it gives the same
    factors again; otherwise the weights are those of the run to within one rounding.)

    Args:
        schedule: a lorafast.schedule.LaMDAFreeze of the model, or None. It is stepped after each
            optimizer step, and set to the step of a run that resumes.

    Raises:
        TypeError: schedule is no schedule; or, once Trainer starts, the model is no transformers
            PreTrainedModel.
        ValueError: the model is not adapted, the schedule is of another model, or a checkpoint is
            of another adapter.
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

    def __init__(self, schedule: Any = None) -> None:
        needed = ("layers", "step", "load_state_dict")
        if schedule is not None and not all(hasattr(schedule, name) for name in needed):
            raise TypeError(
                f"schedule={schedule!r} must be a lorafast.schedule.LaMDAFreeze of the model"
            )
        self.schedule = schedule

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Let the model save adapters and load what it saved.

        The schedule is reset, because Trainer gives the optimizer only what trains now.
        """
        _attach(model)
        self._set_schedule(model, 0)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Set the schedule to the step of the run.

        A model that Trainer made in train() (model_init) is first seen here.
        """
        if _ATTACHED not in vars(model):
            if state.global_step:
                raise RuntimeError(
                    f"the run resumed at step {state.global_step} before AdapterCheckpoint saw its "
                    "model: give the callback to Trainer(callbacks=[...]), not to add_callback, "
                    "and the adapted model as model=, not model_init="
                )
            _attach(model)
        self._set_schedule(model, state.global_step)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Step the schedule."""
        if self.schedule is not None:
            self.schedule.step()

    def _set_schedule(self, model: nn.Module, step: int) -> None:
        if self.schedule is None:
            return
        if not set(self.schedule.layers) <= set(model.modules()):
            raise ValueError(
                "schedule is of another model than Trainer's; it needs model=, not model_init="
            )
        self.schedule.load_state_dict(self.schedule.state_dict() | {"last_step": step})


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
    state = AcceleratorState()
    for plugin in ("fsdp_plugin", "deepspeed_plugin"):
        if getattr(state, plugin, None) is not None:
            raise NotImplementedError(
                f"{plugin}: Trainer writes and loads sharded checkpoints by other ways than the "
                "model's own"
            )
    trainer_files.register_hooks(model)
    vars(model)[_ATTACHED] = True
