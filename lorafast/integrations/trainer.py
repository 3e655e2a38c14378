"""AdapterCheckpoint: transformers.Trainer checkpoints and resumes adapters alone. It needs transformers: import it from here.

Trainer resumes a model that is no PeftModel, and takes its best one back, from a checkpoint's model.safetensors. Here that holds
what an adapter's file holds and what else trains, each tensor once and by its name in the model; what starts took out of weights;
and what the adapters are. Hooks on the model's load_state_dict check all of it before anything changes.
"""

from __future__ import annotations

import functools
import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from safetensors.torch import save_file
from torch import nn
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_NAME

from lorafast.checkpoint.save_load import save_adapter, started
from lorafast.models import extra_trainables
from lorafast.models.module_names import adapted, clean, unwrapped
from lorafast.nn.adapter_layer import NAMES, AdapterLayer

# Keys of model.safetensors that are no tensors of the model: what the adapters are, and what their starts took out of weights.
_ADAPTERS, _START = "lorafast.adapters", "lorafast.start."
# On a model: it has the hooks.
_ATTACHED = "_lorafast_checkpoint"


class AdapterCheckpoint(TrainerCallback):
    """Trainer(model=model, ..., callbacks=[AdapterCheckpoint()]), for a transformers model that lorafast.adapt adapted.

    A checkpoint is a folder as save_adapter writes it, for load_adapter and PEFT, with what Trainer resumes from beside it, and no
    base weight. To resume, adapt the same base alike: the run goes on bit for bit (after a residual start if that gives the same
    factors again; if not, with the run's weights to within a rounding). As with a PeftModel, model.save_pretrained and
    trainer.save_model() write an adapter from then on, after training too; once the model is merged or unloaded, all of it.
    schedule: a lorafast.schedule.LaMDAFreeze of this model, stepped after each optimizer step and set to a resumed run's step.
    TypeError if the model is no PreTrainedModel, ValueError if it is not adapted or the checkpoint is of another adapter,
    RuntimeError if it resumed before the callback saw it (add_callback, model_init), NotImplementedError for FSDP and DeepSpeed.
    """

    def __init__(self, schedule: Any = None) -> None:
        if schedule is not None and not all(
            hasattr(schedule, name) for name in ("layers", "step", "load_state_dict")
        ):
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
        """Let the model save adapters and load what it saved. What an earlier run froze trains again: the optimizer must get it."""
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
        """Put the schedule where the run is; and a model that came after Trainer's construction (model_init) is met here."""
        if _ATTACHED not in vars(model):
            if state.global_step:
                raise RuntimeError(
                    f"the run resumed at step {state.global_step} before AdapterCheckpoint saw its model: give the callback to "
                    "Trainer(callbacks=[...]), not to add_callback, and the adapted model as model=, not model_init="
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
    inner = unwrapped(model)
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(
            f"model must be a transformers PreTrainedModel adapted by lorafast.adapt, not a {type(inner).__name__}: "
            "Trainer writes the whole state dict of anything else (and a PeftModel's adapters by itself)"
        )
    adapted(inner)
    sharding = [
        name
        for name in ("fsdp_plugin", "deepspeed_plugin")
        if getattr(AcceleratorState(), name, None) is not None
    ]
    if sharding:
        raise NotImplementedError(
            f"{sharding[0]}: Trainer writes and loads sharded checkpoints by other ways than the model's own"
        )
    # A partial, unlike a closure, is copied with the model and then saves the copy.
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
    """What an adapted model has for PreTrainedModel.save_pretrained."""
    if not adapted(model, required=False):
        type(model).save_pretrained(
            model, save_directory, is_main_process, state_dict, push_to_hub, **kwargs
        )
        return
    if push_to_hub:
        raise ValueError(
            "push_to_hub=True: an adapter is saved to a folder alone; model.push_to_hub(...) uploads one"
        )
    if is_main_process:
        save_adapter(model, save_directory)
        if re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", Path(save_directory).name):
            _write(model, Path(save_directory))


def _write(model: nn.Module, folder: Path) -> None:
    tensors = {key: tensor for key, (tensor, _) in _held(model).items()} | _starts(model)
    tensors = {
        key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, tensor in tensors.items()
    }
    said = json.dumps(_adapters(model)).encode()
    tensors[_ADAPTERS] = torch.frombuffer(bytearray(said), dtype=torch.uint8)
    partial = folder / f".{SAFE_WEIGHTS_NAME}.tmp"
    save_file(tensors, partial, metadata={"format": "pt"})
    os.replace(partial, folder / SAFE_WEIGHTS_NAME)


def _held(model: nn.Module) -> dict[str, tuple[torch.Tensor, list[str]]]:
    """What an adapter's file holds and what else trains, each tensor once by its first clean name, with all its names."""
    layers = adapted(model).values()
    held = {
        parameter
        for layer in layers
        for name in NAMES
        if (parameter := getattr(layer, name)) is not None
    }
    held |= {
        tensor
        for module in extra_trainables.saved(model).values()
        for tensor in module.state_dict(keep_vars=True).values()
    }
    held |= {module.bias for module in extra_trainables.biases(model).values()}
    held |= {parameter for parameter in model.parameters() if parameter.requires_grad}
    names: dict[torch.Tensor, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor in held:
            names.setdefault(tensor, []).append(name)
    return {clean(found[0]): (tensor, found) for tensor, found in names.items()}


def _starts(model: nn.Module) -> dict[str, torch.Tensor]:
    """What residual starts took out of weights, by key."""
    starts = {name: started(layer) or {} for name, layer in adapted(model).items()}
    return {
        f"{_START}{name}.{part}": tensor
        for name, start in starts.items()
        for part, tensor in start.items()
    }


def _adapters(model: nn.Module) -> dict[str, str]:
    """What of each layer's adapter its tensors do not tell. Its dropout may differ from run to run."""
    layers = adapted(model).items()
    return {
        name: f"{type(one.adapter).__name__}, scaling {float(one.scaling)}, axis {one.adapter.axis!r}"
        for name, one in layers
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
    """If this is a checkpoint's model.safetensors: check it, see that starts are the run's, and give each tensor all its names."""
    if _ADAPTERS not in state_dict:
        return
    _refuse_other(json.loads(bytes(state_dict.pop(_ADAPTERS).tolist())), _adapters(model))
    given = {key: state_dict.pop(key) for key in list(state_dict)}
    held, starts = _held(model), _starts(model)
    _refuse_other(_told(given), _told({key: tensor for key, (tensor, _) in held.items()} | starts))
    for name, layer in adapted(model).items():
        _start_as(name, layer, given)
    for key, (_, names) in held.items():
        state_dict.update(dict.fromkeys(names, given[key]))
    # Base weights are missing from every checkpoint, and nobody needs to be told; _after_loading sees that it is one by this.
    missing.append(_ADAPTERS)


def _start_as(name: str, layer: AdapterLayer, given: dict[str, torch.Tensor]) -> None:
    """Give a layer the run's start unless it has the same, which leaves the run's weight to the bit."""
    own = started(layer) or {}
    start = {part: given[f"{_START}{name}.{part}"] for part in own}
    if not all(torch.equal(start[part], tensor) for part, tensor in own.items()):
        layer.take(
            {part: given[f"{name}.{part}"] for part in NAMES if getattr(layer, part) is not None},
            start,
        )


def _after_loading(model: nn.Module, incompatible_keys: Any) -> None:
    if _ADAPTERS in incompatible_keys.missing_keys:
        incompatible_keys.missing_keys.clear()


def _told(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    return {
        key: f"a {str(tensor.dtype).removeprefix('torch.')} tensor {tuple(tensor.shape)}"
        for key, tensor in tensors.items()
    }


def _refuse_other(theirs: dict[str, str], ours: dict[str, str]) -> None:
    if theirs != ours:
        name = min(
            name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name)
        )
        told = f"{theirs.get(name, 'absent')} there and {ours.get(name, 'absent')} in the model"
        raise ValueError(f"the checkpoint is of another adapter than the model's: {name} is {told}")
