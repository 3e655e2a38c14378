"""AdapterCheckpoint: transformers' Trainer checkpoints and resumes an adapter without its base.

Trainer resumes a model that is no PeftModel, and reloads its best one, from model.safetensors in a
checkpoint. Here that file holds the adapter's tensors and what else trains, each tensor once under
its name in the model; what inits took out of weights; and a description of the adapters. Hooks on
the model's load_state_dict check all of it before anything changes.

Imports transformers, which lorafast itself does not.
"""

from __future__ import annotations

import functools
import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from lorafast.checkpoint.keys import own_tensors
from lorafast.checkpoint.save_load import residual_init, save_adapter
from lorafast.models import extra_trainables
from lorafast.models.module_names import adapter_layers, canonical_name, unwrap
from lorafast.nn.adapter_layer import AdapterLayer
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
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
    from transformers.utils import SAFE_WEIGHTS_NAME

# Keys of model.safetensors beside the model's tensors: the description of the adapters, and the
# prefix of what their inits took out of weights.
_DESCRIPTION, _INIT_PREFIX = "lorafast.adapters", "lorafast.start."
# Attribute of a model that has the hooks.
_ATTACHED = "_lorafast_checkpoint"


class AdapterCheckpoint(TrainerCallback):
    """A Trainer callback that makes checkpoints hold the adapter alone.

    A checkpoint is a folder as save_adapter writes it, which load_adapter and PEFT read, with what
    Trainer resumes from beside it, and no base weight. To resume, adapt the same base in the same
    way: the run continues bit for bit. (After a residual init that is so if it gives the same
    factors again; otherwise the weights are those of the run to within one rounding.)

    From then on model.save_pretrained and trainer.save_model() write an adapter too, also after
    training; once the model is merged or unloaded, they write all of it, as for a PeftModel.

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
    """Replace the model's save_pretrained and register the hooks that load a checkpoint."""
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
    # copy.deepcopy copies a partial with the model, so that the copy saves itself; not a closure.
    inner.save_pretrained = functools.partial(_save_pretrained, inner)
    if _ATTACHED not in vars(model):
        model.register_load_state_dict_pre_hook(_before_loading)
        model.register_load_state_dict_post_hook(_after_loading)
        vars(model)[_ATTACHED] = True


def _save_pretrained(
    model: PreTrainedModel,
    save_directory: str | os.PathLike,
    is_main_process: bool = True,
    state_dict: dict[str, torch.Tensor] | None = None,
    push_to_hub: bool = False,
    **kwargs: Any,
) -> None:
    """Save the adapter; the whole model if it is adapted no more."""
    if not adapter_layers(model, required=False):
        type(model).save_pretrained(
            model, save_directory, is_main_process, state_dict, push_to_hub, **kwargs
        )
        return
    if push_to_hub:
        raise ValueError(
            "push_to_hub=True: an adapter is saved to a folder alone; model.push_to_hub(...) "
            "uploads one"
        )
    if is_main_process:
        save_adapter(model, save_directory)
        if re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", Path(save_directory).name):
            _write_checkpoint(model, Path(save_directory))


def _write_checkpoint(model: nn.Module, folder: Path) -> None:
    """Write model.safetensors, from which Trainer resumes."""
    tensors = {key: tensor for key, (tensor, _) in _checkpoint_tensors(model).items()}
    tensors |= _init_tensors(model)
    tensors = {
        key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, tensor in tensors.items()
    }
    description = json.dumps(_describe_adapters(model)).encode()
    tensors[_DESCRIPTION] = torch.frombuffer(bytearray(description), dtype=torch.uint8)
    temporary = folder / f".{SAFE_WEIGHTS_NAME}.tmp"
    save_file(tensors, temporary, metadata={"format": "pt"})
    os.replace(temporary, folder / SAFE_WEIGHTS_NAME)


def _checkpoint_tensors(model: nn.Module) -> dict[str, tuple[torch.Tensor, list[str]]]:
    """Return what an adapter's file holds and what else trains.

    Each tensor comes once, under its first canonical name, with all its names in the state dict.
    """
    wanted: set[torch.Tensor] = set()
    for layer in adapter_layers(model).values():
        wanted.update(own_tensors(layer).values())
    for module in extra_trainables.saved_modules(model).values():
        wanted.update(module.state_dict(keep_vars=True).values())
    for module in extra_trainables.trained_biases(model).values():
        wanted.add(module.bias)
    wanted.update(parameter for parameter in model.parameters() if parameter.requires_grad)
    names: dict[torch.Tensor, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor in wanted:
            names.setdefault(tensor, []).append(name)
    return {canonical_name(all_names[0]): (t, all_names) for t, all_names in names.items()}


def _init_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return what residual inits took out of weights, by key."""
    return {
        f"{_INIT_PREFIX}{name}.{part}": tensor
        for name, layer in adapter_layers(model).items()
        for part, tensor in (residual_init(layer) or {}).items()
    }


def _describe_adapters(model: nn.Module) -> dict[str, str]:
    """Return what the tensors of an adapter do not tell, by layer name.

    Its dropout is left out: it may differ from run to run.
    """
    return {
        name: (
            f"{type(layer.adapter).__name__}, scaling {float(layer.scaling)}, "
            f"axis {layer.adapter.axis!r}"
        )
        for name, layer in adapter_layers(model).items()
    }


def _before_loading(
    model: nn.Module,
    state_dict: dict[str, torch.Tensor],
    prefix: str,
    metadata: dict[str, Any],
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Check a checkpoint's model.safetensors, load inits, and put each tensor under all its names.

    Does nothing for any other state dict.
    """
    if _DESCRIPTION not in state_dict:
        return
    description = json.loads(bytes(state_dict.pop(_DESCRIPTION).tolist()))
    _refuse_other(description, _describe_adapters(model))
    loaded = {key: state_dict.pop(key) for key in list(state_dict)}
    tensors = _checkpoint_tensors(model)
    expected = {key: tensor for key, (tensor, _) in tensors.items()} | _init_tensors(model)
    _refuse_other(_describe_tensors(loaded), _describe_tensors(expected))
    for name, layer in adapter_layers(model).items():
        _load_init(name, layer, loaded)
    for key, (_, names) in tensors.items():
        state_dict.update(dict.fromkeys(names, loaded[key]))
    # For _after_loading: this is a checkpoint, and every base weight is missing from it.
    missing.append(_DESCRIPTION)


def _load_init(name: str, layer: AdapterLayer, loaded: dict[str, torch.Tensor]) -> None:
    """Give a layer the init of the checkpoint, unless its own is the same.

    If it is the same, the weight already is the run's, bit for bit.
    """
    present = residual_init(layer) or {}
    initial = {part: loaded[f"{_INIT_PREFIX}{name}.{part}"] for part in present}
    if not all(torch.equal(initial[part], tensor) for part, tensor in present.items()):
        layer.take({part: loaded[f"{name}.{part}"] for part in own_tensors(layer)}, initial)


def _after_loading(model: nn.Module, incompatible_keys: Any) -> None:
    """Drop the missing keys of a checkpoint: its base weights, which it never holds."""
    if _DESCRIPTION in incompatible_keys.missing_keys:
        incompatible_keys.missing_keys.clear()


def _describe_tensors(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    return {
        key: f"a {str(tensor.dtype).removeprefix('torch.')} tensor {tuple(tensor.shape)}"
        for key, tensor in tensors.items()
    }


def _refuse_other(in_checkpoint: dict[str, str], in_model: dict[str, str]) -> None:
    """Raise ValueError naming the first difference between a checkpoint's and a model's adapter."""
    differing = [
        name
        for name in in_checkpoint.keys() | in_model.keys()
        if in_checkpoint.get(name) != in_model.get(name)
    ]
    if differing:
        name = min(differing)
        raise ValueError(
            f"the checkpoint is of another adapter than the model's: {name} is "
            f"{in_checkpoint.get(name, 'absent')} there and {in_model.get(name, 'absent')} in "
            "the model"
        )
