"""ScheduleCallback: transformers' Trainer steps, saves and resumes a schedule of lorafast.

The state of a schedule stands in the first parameter group of the optimizer's state dict, because a
callback is never told the folder of a checkpoint: it is saved, moved, uploaded and loaded with the
optimizer's state. The optimizer itself does not hold it.

Imports transformers, which lorafast itself does not.
"""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
import weakref
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lorafast.models.gradient_check import adapters_without_gradient
from lorafast.models.module_names import format_names, unwrap
from lorafast.nn.frozen_columns import FrozenColumns
from lorafast.runtime import extras
from lorafast.schedule.lamda import LaMDAFreeze

with extras.required("peft"):
    from accelerate.optimizer import AcceleratedOptimizer
    from accelerate.state import AcceleratorState
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

# Key of a parameter group in an optimizer's state dict.
_STATE_KEY = "lorafast_schedule"
_METHODS = ("step", "state_dict", "load_state_dict", "parameters")
# The models whose first step has been checked.
_CHECKED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class ScheduleCallback(TrainerCallback):
    """A Trainer callback that steps a schedule after each optimizer step.

    The schedule is made when training begins, for as many steps as the Trainer is going to make.
    Its state is saved in the checkpoints, in optimizer.pt, and a run that resumes goes on bit for
    bit. The gradient of AdaLoRA's penalty() is added once per optimizer step, before gradients are
    clipped; the loss that Trainer logs is without it. The model may be adapted, a PeftModel, or
    plain for a LISA. AdapterCheckpoint takes the same arguments.

    After the first step, names in one warning the adapters that got no gradient.

    Args:
        schedule: a class of lorafast.schedule, or a function that returns a schedule. It is called
            as schedule(model, total_steps=the Trainer's, **options); total_steps is left out if it
            is among the options or no argument of it. Or a schedule of the model, not yet stepped.
        **options: further arguments of the class or function.

    Attributes:
        schedule: the schedule; None before training begins, unless it was given.

    Raises:
        TypeError: schedule is none of these, or does not take the options.
        ValueError: the schedule is of another model, has been stepped, or changes Parameters that
            the optimizer lacks; or a checkpoint holds no state of it.
        NotImplementedError: Trainer uses FSDP or DeepSpeed.

    Example:
        import tempfile, torch, transformers, lorafast
        from lorafast.integrations.trainer import ScheduleCallback

        sizes = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 32}
        config = transformers.LlamaConfig(num_hidden_layers=2, num_attention_heads=2, **sizes)
        ids = torch.arange(8)
        with tempfile.TemporaryDirectory() as folder:
            trainer = transformers.Trainer(
                model=transformers.LlamaForCausalLM(config),
                args=transformers.TrainingArguments(
                    folder, max_steps=2, save_steps=2, report_to="none", use_cpu=True
                ),
                train_dataset=[{"input_ids": ids, "labels": ids}],
                callbacks=[ScheduleCallback(lorafast.schedule.LISA, active=1, every=1)],
            )
            trainer.train()
    """

    def __init__(self, schedule: Any, **options: Any) -> None:
        self.schedule: Any = None
        self._make: functools.partial | None = None
        self._initial: dict[str, Any] | None = None
        self._handle: RemovableHandle | None = None
        if all(hasattr(schedule, name) for name in _METHODS) and not isinstance(schedule, type):
            if options:
                raise TypeError(
                    f"{', '.join(options)}: a schedule that is made already takes no options"
                )
            self.schedule, self._initial = schedule, copy.deepcopy(schedule.state_dict())
            _require_fresh(schedule)
        elif callable(schedule):
            _check_options(schedule, options)
            self._make = functools.partial(schedule, **options)
        elif schedule is not None:
            raise TypeError(
                f"schedule={schedule!r} must be a class of lorafast.schedule such as LaMDAFreeze, "
                "a function of model and total_steps that returns a schedule, or a schedule of the "
                "model"
            )

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Let train what an earlier run froze, because Trainer gives its optimizer what trains."""
        if self._has_schedule and model is not None:
            refuse_sharded()
            self._reset(model)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Make the schedule, or reset it, and load the state of a run that resumes."""
        if not self._has_schedule:
            return
        assert model is not None
        refuse_sharded()
        inner = _inner_optimizer(optimizer)
        saved = inner.param_groups[0].pop(_STATE_KEY, None)
        self._reset(model)
        if self._make is not None:
            self.schedule = self._make_schedule(model, state.max_steps)
        _check_optimizer(self.schedule, inner)
        if state.global_step:
            _resume(self.schedule, saved, state.global_step)
        planned = getattr(self.schedule, "total_steps", state.max_steps)
        if planned != state.max_steps:
            warnings.warn(
                f"{type(self.schedule).__name__} is planned for total_steps={planned}, and Trainer "
                f"makes {state.max_steps} steps",
                stacklevel=2,
            )
        self._remove_hook()
        self._handle = inner.register_state_dict_post_hook(self._save_state)

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Begin the gradients of the step with those of the schedule's penalty, if it has one."""
        if hasattr(self.schedule, "penalty"):
            _add_penalty_gradients(self.schedule, getattr(optimizer, "scaler", None))

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Check the first step of a model."""
        assert model is not None
        if model not in _CHECKED:
            _CHECKED.add(model)
            _warn_of_untrained(model)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Step the schedule."""
        if self.schedule is not None:
            self.schedule.step()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let all blocks of a LISA train again."""
        self._remove_hook()
        if self._make is not None and hasattr(self.schedule, "close"):
            self.schedule.close()

    @property
    def _has_schedule(self) -> bool:
        return self._make is not None or self.schedule is not None

    def _reset(self, model: nn.Module) -> None:
        """Undo what earlier runs froze; bring a given schedule back to its beginning."""
        if self._make is None:
            owned = set(self.schedule.parameters())
            if not owned <= set(model.parameters()):
                raise ValueError(
                    "schedule is of another model than Trainer's; it needs model=, not "
                    "model_init=, or the class of the schedule instead of a schedule"
                )
            self.schedule.load_state_dict(copy.deepcopy(self._initial))
            return
        if hasattr(self.schedule, "close"):
            self.schedule.close()
        for module in unwrap(model).modules():
            if isinstance(module, FrozenColumns):
                module.unfreeze()

    def _make_schedule(self, model: nn.Module, total_steps: int) -> Any:
        assert self._make is not None
        given = {} if "total_steps" in self._make.keywords else {"total_steps": total_steps}
        takes_it = _takes_total_steps(self._make.func)
        schedule = self._make(model, **given) if takes_it else self._make(model)
        if missing := [name for name in _METHODS if not hasattr(schedule, name)]:
            raise TypeError(
                f"schedule={self._make.func!r} must return a schedule of lorafast; "
                f"{schedule!r} has no {missing[0]}"
            )
        _require_fresh(schedule)
        return schedule

    def _save_state(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        """Add the schedule's state to a state dict of the optimizer, whose groups are copies."""
        saved = {"name": type(self.schedule).__name__, "state": self.schedule.state_dict()}
        state_dict["param_groups"][0][_STATE_KEY] = saved

    def _remove_hook(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


def refuse_sharded() -> None:
    """Raise NotImplementedError if Trainer uses FSDP or DeepSpeed."""
    state = AcceleratorState()
    for plugin in ("fsdp_plugin", "deepspeed_plugin"):
        if getattr(state, plugin, None) is not None:
            raise NotImplementedError(
                f"{plugin}: Trainer writes and loads sharded checkpoints by other ways than the "
                "model's and the optimizer's own"
            )


def _check_options(schedule: Any, options: dict[str, Any]) -> None:
    """Raise TypeError if the class or function cannot be called with the options."""
    given = {"total_steps": 1} if _takes_total_steps(schedule) else {}
    try:
        inspect.signature(schedule).bind(None, **given | options)
    except TypeError as error:
        name = getattr(schedule, "__name__", repr(schedule))
        raise TypeError(f"schedule={name} cannot be called with its options: {error}") from None


def _takes_total_steps(schedule: Any) -> bool:
    parameters = inspect.signature(schedule).parameters.values()
    return any(p.name == "total_steps" or p.kind is p.VAR_KEYWORD for p in parameters)


def _require_fresh(schedule: Any) -> None:
    if schedule.last_step:
        raise ValueError(
            f"schedule has made {schedule.last_step} steps already: give a new one, or its class"
        )


def _inner_optimizer(optimizer: Any) -> Optimizer:
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def _check_optimizer(schedule: Any, optimizer: Optimizer) -> None:
    known = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    missing = [parameter for parameter in schedule.parameters() if parameter not in known]
    if missing:
        raise ValueError(
            f"the optimizer lacks {len(missing)} Parameters that {type(schedule).__name__} lets "
            f"train, the first of shape {tuple(missing[0].shape)}: they were frozen when it was "
            "made. Give ScheduleCallback the class of the schedule instead of a schedule"
        )


def _resume(schedule: Any, saved: dict[str, Any] | None, step: int) -> None:
    """Load the state of the checkpoint at this step; ValueError if it has none."""
    name = type(schedule).__name__
    if saved is None and isinstance(schedule, LaMDAFreeze):
        # Its state is the step alone, and earlier versions saved no more.
        saved = {"name": name, "state": schedule.state_dict() | {"last_step": step}}
    if saved is None or saved["name"] != name:
        raise ValueError(
            f"the checkpoint at step {step} holds {saved['name'] if saved else 'no schedule'}, not "
            f"the state of a {name}: it was made without this callback, or with save_only_model"
        )
    state = saved["state"]
    if state["last_step"] != step:
        raise ValueError(
            f"the checkpoint at step {step} holds a {name} after {state['last_step']} steps"
        )
    differing = {
        key: (state[key], value)
        for key, value in schedule.state_dict().items()
        if key != "last_step" and isinstance(value, int | float) and state.get(key) != value
    }
    if differing:
        changes = ", ".join(f"{key}={old} and not {new}" for key, (old, new) in differing.items())
        warnings.warn(f"{name} resumes as it was saved, with {changes}", stacklevel=3)
    schedule.load_state_dict(state)


def _add_penalty_gradients(schedule: Any, scaler: torch.amp.GradScaler | None) -> None:
    """Add the gradient of penalty() to those of its Parameters, scaled as the loss will be.

    Not by backward(), whose hooks would make DDP reduce the gradients now.
    """
    parameters = [parameter for parameter in schedule.parameters() if parameter.requires_grad]
    penalty = schedule.penalty()
    if not penalty.requires_grad:
        return
    if scaler is not None:
        penalty = scaler.scale(penalty)
    gradients = torch.autograd.grad(penalty, parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            continue
        if parameter.grad is None:
            parameter.grad = gradient
        else:
            parameter.grad += gradient


def _warn_of_untrained(model: nn.Module) -> None:
    if names := adapters_without_gradient(model):
        adapters = "adapter of 1 layer" if len(names) == 1 else f"adapters of {len(names)} layers"
        warnings.warn(
            f"the {adapters} got no gradient in the first step: "
            f"{format_names(names)}. Unless they are experts that no token reached, nothing calls "
            "these layers (a fused loss or attention reads their weights itself), and their "
            "adapters have no effect: leave them out of target_modules",
            stacklevel=2,
        )
