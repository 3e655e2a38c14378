"""LaMDA's gradual freezing of B (arXiv:2406.12832)."""

from __future__ import annotations

from typing import Any

from torch import nn

from lorafast.engine import checks
from lorafast.methods.lamda import LaMDA
from lorafast.models.module_names import canonical_name, unwrap
from lorafast.nn.adapter_layer import AdapterLayer
from lorafast.nn.frozen_columns import FrozenColumns


class LaMDAFreeze:
    """The schedule of LaMDA: the columns of lora_B freeze one after the other.

        frozen(t) = min(R, ⌊R·t / (fraction·T)⌋)        after step t of T = total_steps

    Columns freeze in index order, which is the order of the singular values, largest first. Once
    all R are frozen, only the R×R core trains. Call `step()` after optimizer.step() and before
    zero_grad().

    A frozen column stays constant bit for bit: `step()` undoes what momentum or weight decay did to
    it. Its gradient is 0 and is not computed. While some columns train, the values of the frozen
    ones are stored once more. When all are frozen, lora_B.requires_grad is False and the copy is
    deleted; in a process group both stay, because DDP waits for every gradient that it was built
    with. Make the schedule before torch.compile runs first: two graphs then serve the whole run,
    one until all columns are frozen. They compute the gradient of every column and drop it.

    The exact formula could not be checked against the paper's text; fraction = 0.3 and the order
    are those of the authors' code.

    Args:
        model: a model with LaMDA adapters: of lorafast.adapt, or of a LamdaConfig in PEFT.
        total_steps: T, the number of optimizer steps of the run, at least 1.
        fraction: the share of the run in (0, 1] after which all columns are frozen.
        group: number of columns that freeze at a time, at least 1.

    Raises:
        TypeError: model is no module.
        ValueError: the model has no LaMDA layer, or an argument is out of range.

    Example:
        import torch, lorafast

        model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8))
        lorafast.adapt(model, lorafast.LaMDA(r=4))
        optimizer = torch.optim.AdamW(lorafast.adapter_parameters(model), lr=1e-3)
        schedule = lorafast.schedule.LaMDAFreeze(model, total_steps=10)
        for _ in range(10):
            model(torch.randn(4, 64)).square().mean().backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

    Source:
        arXiv:2406.12832
    """

    def __init__(
        self, model: nn.Module, total_steps: int, fraction: float = 0.3, group: int = 1
    ) -> None:
        self.layers = list(lamda_layers(model).values())
        if not self.layers:
            raise ValueError(f"model {type(model).__name__} has no layer with a LaMDA adapter")
        self._configure(0, total_steps, fraction, group)
        for layer in self.layers:
            layer.begin_freezing()

    def parameters(self) -> list[nn.Parameter]:
        """Return the Parameters that train at some time: an optimizer must have all of them.

        Returns:
            Every lora_B, without those that were frozen before.
        """
        return [layer._factor_B() for layer in self.layers if layer.trains]

    def frozen_columns(self, r: int, step: int) -> int:
        """Return how many columns of a layer are frozen.

        Args:
            r: the rank of the layer.
            step: number of steps done.

        Returns:
            A number in 0…r, a multiple of `group` while it is below r.
        """
        # The constant absorbs the rounding of the quotient at whole numbers.
        due = min(r, int(r * step / (self.fraction * self.total_steps) + 1e-9))
        return due if due == r else due - due % self.group

    def step(self) -> None:
        """Restore the frozen columns, then freeze those that are due."""
        for layer in self.layers:
            layer.restore_columns()
        self.last_step += 1
        self._freeze()

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps done and the settings.

        Returns:
            "last_step", "total_steps", "fraction" and "group". The frozen values are in the model's
            state dict.
        """
        return {
            "last_step": self.last_step,
            "total_steps": self.total_steps,
            "fraction": self.fraction,
            "group": self.group,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a saved schedule, before or after the model's state is loaded.

        Columns are frozen at the values that they have then.

        Args:
            state: a result of `state_dict`.

        Raises:
            ValueError: the keys are others, or a setting is out of range.
        """
        if state.keys() != self.state_dict().keys():
            raise ValueError(f"state {sorted(state)} must hold {sorted(self.state_dict())}")
        self._configure(**state)
        self._freeze()

    def _configure(self, last_step: int, total_steps: int, fraction: float, group: int) -> None:
        checks.whole("last_step", last_step, 0)
        checks.whole("total_steps", total_steps)
        checks.whole("group", group)
        if not isinstance(fraction, int | float) or not 0 < fraction <= 1:
            raise ValueError(f"fraction={fraction!r} must be a number in (0, 1]")
        self.last_step, self.total_steps = last_step, total_steps
        self.fraction, self.group = fraction, group

    def _freeze(self) -> None:
        for layer in self.layers:
            due = self.frozen_columns(layer._factor_B().shape[-1], self.last_step)
            if due != layer.frozen_columns:
                layer.freeze_columns(due)


def lamda_layers(model: nn.Module) -> dict[str, FrozenColumns]:
    """Return what holds the lora_B of every LaMDA adapter, by canonical name.

    It is the adapted layer, or a part of PEFT's layer for an adapter of a LamdaConfig.
    """
    layers: dict[str, FrozenColumns] = {}
    for name, module in unwrap(model).named_modules():
        if isinstance(module, AdapterLayer):
            found = isinstance(module.adapter, LaMDA)
        else:
            # PEFT has several adapters in a layer, and those that are not active do not train.
            found = isinstance(module, FrozenColumns) and module.trains
        if found:
            layers[canonical_name(name)] = module
    return layers
