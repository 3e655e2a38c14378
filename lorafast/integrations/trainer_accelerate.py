"""AccelerateCallback: transformers' Trainer runs a PEFT model on lorafast's ops.

Imports transformers, which lorafast itself does not.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

from lorafast.engine import checks
from lorafast.integrations.accelerate import Report, accelerate, carries_adapter
from lorafast.models.module_names import unwrap
from lorafast.runtime import extras

with extras.required("peft"):
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class AccelerateCallback(TrainerCallback):
    """A Trainer callback that runs the layers of a PEFT model on lorafast's ops.

    It does what lorafast.accelerate(trainer.model) does, also where the trainer makes the PEFT
    model of a peft_config: when the Trainer has been made, before anything wraps the model, or when
    training begins for a model that is made then (model_init), and for a callback that add_callback
    adds later. Nothing else of the run changes.

    Args:
        dropout_on: as in lorafast.accelerate.
        keep: as in lorafast.accelerate.

    Attributes:
        report: the Report of lorafast.accelerate; None before.

    Raises:
        ValueError: an option is wrong; or, when training begins, the model has no PEFT adapter.

    Example:
        import peft, tempfile, torch, transformers
        from lorafast.integrations import AccelerateCallback

        sizes = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 32}
        config = transformers.LlamaConfig(num_hidden_layers=1, num_attention_heads=2, **sizes)
        model = transformers.LlamaForCausalLM(config)
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
        ids = torch.arange(8)
        with tempfile.TemporaryDirectory() as folder:
            trainer = transformers.Trainer(
                model=model,
                args=transformers.TrainingArguments(
                    folder, max_steps=1, report_to="none", use_cpu=True
                ),
                train_dataset=[{"input_ids": ids, "labels": ids}],
                callbacks=[AccelerateCallback()],
            )
            trainer.train()
    """

    def __init__(self, dropout_on: str | None = None, keep: str = "inner") -> None:
        checks.words("out", "both" if dropout_on is None else dropout_on, keep, 0.0)
        self.report: Report | None = None
        self._options = {"dropout_on": dropout_on, "keep": keep}
        self._model: weakref.ref[nn.Module] | None = None

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Accelerate the model, if the Trainer has one with adapters already."""
        if model is not None and carries_adapter(model):
            self._accelerate(model)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Accelerate the model, if that has not been done."""
        assert model is not None
        if self._model is None or self._model() is not unwrap(model):
            self._accelerate(model)

    def _accelerate(self, model: nn.Module) -> None:
        self.report = accelerate(model, **self._options)
        self._model = weakref.ref(unwrap(model))
