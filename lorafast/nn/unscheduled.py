"""The warning of LaMDA adapters that train without a schedule, at their first optimizer step.

A hook of all of torch's optimizers gives it, because every way of training makes optimizer steps. A
backward pass would be too early: it may serve a test or an init, and a schedule may come after it.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    from lorafast.nn.frozen_columns import FrozenColumns

# What holds a lora_B that a schedule should freeze and that no step is known to have trained.
_waiting: weakref.WeakSet[FrozenColumns] = weakref.WeakSet()
_lock = threading.Lock()
# Never removed: torch iterates over its hooks while they run, in every thread that trains.
_handle: RemovableHandle | None = None


def expect_schedule(layer: FrozenColumns) -> None:
    """Warn at the first optimizer step that trains the layer's B, unless a schedule freezes it."""
    global _handle
    with _lock:
        _waiting.add(layer)
        if _handle is None:
            _handle = register_optimizer_step_post_hook(_after_step)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Warn, once for a model, if the step trained a layer that waits for a schedule."""
    if not _waiting:
        return
    if count := _take_trained(optimizer):
        adapters = "1 LaMDA adapter trains" if count == 1 else f"{count} LaMDA adapters train"
        warnings.warn(
            f"{adapters} without a schedule, so that all of lora_B trains to the end. LaMDA "
            "freezes it by lorafast.schedule.LaMDAFreeze(model, total_steps), made before the "
            "first step and stepped after each; under transformers' Trainer by "
            "callbacks=[ScheduleCallback(lorafast.schedule.LaMDAFreeze)], imported from "
            "lorafast.integrations.trainer",
            stacklevel=3,
        )


def _take_trained(optimizer: Optimizer) -> int:
    """Return how many B the step trained without a schedule; their layers wait no longer."""
    with _lock:
        for layer in [layer for layer in _waiting if layer.freezing]:
            _waiting.discard(layer)
        factors = [(layer, layer._factor_B()) for layer in _waiting]
        # The B of a parametrization is no leaf, and the optimizer has not got it.
        factors = [(layer, B) for layer, B in factors if B.is_leaf and B.requires_grad]
        if all(B.grad is None for _, B in factors):
            return 0
        groups = optimizer.param_groups
        stepped = {id(parameter) for group in groups for parameter in group["params"]}
        # Those without a gradient too: experts that no token of this step reached.
        trained = [(layer, id(B)) for layer, B in factors if id(B) in stepped]
        for layer, _ in trained:
            _waiting.discard(layer)
        return len({number for _, number in trained})
