"""How each method trains a model: its spec, optimizer, schedule and learning rate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple, Protocol

import torch
from torch import nn

import lorafast
from lorafast import optim, schedule
from lorafast.methods.adapter import Adapter


class Schedule(Protocol):
    """A schedule; step() is called after the optimizers' step()."""

    def step(self) -> None:
        """Advance by one training step."""


class Recipe(NamedTuple):
    """How a method trains.

    lr: the learning rate of what trains in the encoder; the head has its own.
    fields: fields of the spec, besides rank, alpha and dropout.
    optimizer: called with (encoder, lr, R). It steps the encoder alone; without one, AdamW steps
        encoder and head.
    schedule: called with (encoder, its optimizer, total_steps).
    spectral_ranks: every layer gets a rank from the spectrum of its weight.
    needs_gradients: the init reads the gradients of a few batches.
    """

    lr: float
    fields: Mapping[str, object] = MappingProxyType({})
    optimizer: Callable[[nn.Module, float, int], torch.optim.Optimizer] | None = None
    schedule: Callable[[nn.Module, torch.optim.Optimizer, int], Schedule] | None = None
    spectral_ranks: bool = False
    needs_gradients: bool = False


def _lora_plus(model: nn.Module, lr: float, R: int) -> torch.optim.Optimizer:
    return optim.LoRAPlus(model, torch.optim.AdamW, lr=lr, ratio=16)


def _lora_pro(model: nn.Module, lr: float, R: int) -> torch.optim.Optimizer:
    return optim.LoRAPro(model, lr)


def _lora_fa(model: nn.Module, lr: float, R: int) -> torch.optim.Optimizer:
    return optim.LoRAFA(model, lr)


def _galore(model: nn.Module, lr: float, R: int) -> torch.optim.Optimizer:
    return optim.GaLore(model, lr, rank=R, update_gap=50)


def _lora_as_optimizer(model: nn.Module, lr: float, R: int) -> torch.optim.Optimizer:
    return optim.LoRAAsOptimizer(model, torch.optim.AdamW, lr, r=R, alpha=2 * R)


def _freeze(model: nn.Module, _: torch.optim.Optimizer, steps: int) -> Schedule:
    return schedule.LaMDAFreeze(model, steps)


def _adalora(model: nn.Module, _: torch.optim.Optimizer, steps: int) -> Schedule:
    return schedule.AdaLoRA(model, steps, steps // 10, steps // 3)


def _aflora(model: nn.Module, _: torch.optim.Optimizer, steps: int) -> Schedule:
    return schedule.AFLoRA(model, steps)


def _lisa(model: nn.Module, _: torch.optim.Optimizer, steps: int) -> Schedule:
    return schedule.LISA(model, "encoder.layer", active=2)


# In the order of list_methods. LaMDA changes the largest singular directions of every weight, and
# full fine-tuning all directions, hence their small rates.
RECIPES = {
    "lora": Recipe(5e-4),
    "rslora": Recipe(2e-4, {"rslora": True}),
    "pissa": Recipe(2e-4, {"init": lorafast.PiSSA()}),
    "lora-ga": Recipe(2e-4, needs_gradients=True),
    "lora+": Recipe(2e-4, optimizer=_lora_plus),
    "lora-pro": Recipe(2e-4, optimizer=_lora_pro),
    "lora-fa": Recipe(1e-3, {"freeze_A": True}, _lora_fa),
    "dora": Recipe(5e-4),
    "dora-exact": Recipe(5e-4, {"detach_norm": False}),
    "dora-magnitude": Recipe(1e-2, {"magnitude_only": True, "dropout": 0.0}),
    "lamda": Recipe(3e-4, schedule=_freeze),
    "lamda++": Recipe(3e-4, schedule=_freeze, spectral_ranks=True),
    "vera": Recipe(1e-2),
    "adalora": Recipe(2e-3, schedule=_adalora),
    "aflora": Recipe(2e-3, schedule=_aflora),
    "galore": Recipe(1e-3, optimizer=_galore),
    "lora-as-optimizer": Recipe(5e-4, optimizer=_lora_as_optimizer),
    "lisa": Recipe(1e-4, schedule=_lisa),
}

_SPECS = {method.name: method.adapter for method in lorafast.list_methods()}


def spec(
    method: str, R: int, dropout: float, dropout_on: str = "adapter", **more: object
) -> Adapter | None:
    """Return the method's spec, with scaling s = alpha/r = 2 where it has an alpha.

    dropout_on is used by the methods that have the option. None for methods without an adapter.
    """
    if (kind := _SPECS[method]) is None:
        return None
    fields = {
        "r": R,
        "target_r": max(1, 2 * R // 3),
        "alpha": 2 * R,
        "dropout": dropout,
        "dropout_on": dropout_on,
        **RECIPES[method].fields,
        **more,
    }
    return kind(**{name: fields[name] for name in fields if name in kind.__dataclass_fields__})


def with_gradient_init(
    adapter: Adapter,
    base: nn.Module,
    batches: Iterable[dict],
    loss: Callable[[nn.Module, dict], torch.Tensor],
) -> Adapter:
    """Return the spec with LoRA-GA's init from the gradients of these batches."""
    return replace(adapter, init=lorafast.LoRAGA(lorafast.estimate_gradients(base, batches, loss)))


def spectral_ranks(base: nn.Module, R: int) -> dict[str, int]:
    """Return a rank of R/2, R or 2R per layer by the weights' spectra, R on average."""
    return lorafast.spectral_ranks(base, ranks=(max(1, R // 2), R, 2 * R), budget=R)
