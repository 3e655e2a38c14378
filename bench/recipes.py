"""How each method trains a model: its spec, its optimizer, its schedule, and a learning rate at which it learns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple, Protocol

import torch
from torch import nn

import lorafast
from lorafast import optim
from lorafast import schedule as schedules
from lorafast.methods.adapter import Adapter


class Schedule(Protocol):
    """What step() is called on after the optimizers'."""

    def step(self) -> None: ...


class Recipe(NamedTuple):
    """rate: of what trains of the encoder; the head has its own. fields: of the spec, beyond rank, alpha and dropout.

    optimizer(encoder, rate, R): the encoder's alone; without one AdamW has it together with the head. schedule(encoder, its
    optimizer, steps). spread: layers get ranks of their own by their spectra. sampled: the start reads a gradient first.
    """

    rate: float
    fields: Mapping[str, object] = MappingProxyType({})
    optimizer: Callable[[nn.Module, float, int], torch.optim.Optimizer] | None = None
    schedule: Callable[[nn.Module, torch.optim.Optimizer, int], Schedule] | None = None
    spread: bool = False
    sampled: bool = False


def _freeze(model: nn.Module, _: torch.optim.Optimizer, steps: int) -> Schedule:
    return schedules.LaMDAFreeze(model, steps)


# In the order of list_methods. LaMDA moves the largest singular directions of every weight, and full fine-tuning all of them.
RECIPES = {
    "lora": Recipe(5e-4),
    "rslora": Recipe(2e-4, {"rslora": True}),
    "pissa": Recipe(2e-4, {"init": lorafast.PiSSA()}),
    "lora-ga": Recipe(2e-4, sampled=True),
    "lora+": Recipe(
        2e-4,
        optimizer=lambda model, rate, R: optim.LoRAPlus(
            model, torch.optim.AdamW, lr=rate, ratio=16
        ),
    ),
    "lora-pro": Recipe(2e-4, optimizer=lambda model, rate, R: optim.LoRAPro(model, rate)),
    "lora-fa": Recipe(1e-3, {"freeze_A": True}, lambda model, rate, R: optim.LoRAFA(model, rate)),
    "dora": Recipe(5e-4),
    "dora-exact": Recipe(5e-4, {"detach_norm": False}),
    "dora-magnitude": Recipe(1e-2, {"magnitude_only": True, "dropout": 0.0}),
    "lamda": Recipe(3e-4, schedule=_freeze),
    "lamda++": Recipe(3e-4, schedule=_freeze, spread=True),
    "vera": Recipe(1e-2),
    "adalora": Recipe(
        2e-3,
        schedule=lambda model, optimizer, steps: schedules.AdaLoRA(
            model, steps, steps // 10, steps // 3
        ),
    ),
    "aflora": Recipe(2e-3, schedule=lambda model, optimizer, steps: schedules.AFLoRA(model, steps)),
    "galore": Recipe(
        1e-3, optimizer=lambda model, rate, R: optim.GaLore(model, rate, rank=R, update_gap=50)
    ),
    "lora-as-optimizer": Recipe(
        5e-4,
        optimizer=lambda model, rate, R: optim.LoRAAsOptimizer(
            model, torch.optim.AdamW, rate, r=R, alpha=2 * R
        ),
    ),
    "lisa": Recipe(
        1e-4,
        schedule=lambda model, optimizer, steps: schedules.LISA(model, "encoder.layer", active=2),
    ),
}


_KINDS = {method.name: method.adapter for method in lorafast.list_methods()}
# Those whose layer is no other method's: the rest differ in how they start, or in who makes the step.
LAYERS = ("lora", "dora", "lamda", "lora-fa", "vera", "adalora", "aflora")


def spec(
    method: str, R: int, dropout: float, dropout_on: str = "adapter", **more: object
) -> Adapter | None:
    """The method's spec, s = alpha/r = 2 where it has an alpha; dropout_on where it has the choice. None where weights train."""
    if (kind := _KINDS[method]) is None:
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
    return kind(
        **{name: value for name, value in fields.items() if name in kind.__dataclass_fields__}
    )


def sampled(
    adapter: Adapter,
    base: nn.Module,
    batches: Iterable[dict],
    loss: Callable[[nn.Module, dict], torch.Tensor],
) -> Adapter:
    """The spec with a start from the gradients of these batches."""
    return replace(adapter, init=lorafast.LoRAGA(lorafast.estimate_gradients(base, batches, loss)))


def spread(base: nn.Module, R: int) -> dict[str, int]:
    """Ranks R/2, R and 2R by the weights' spectra, R on average."""
    return lorafast.spectral_ranks(base, ranks=(max(1, R // 2), R, 2 * R), budget=R)
