"""Faults to plant in the six primitives, one output at a time: what a bench that is worth its name must not let pass."""

import functools
from typing import NamedTuple

import torch

from lorafast.engine.backends import cpu, eager

OFF = 1.01


class Fault(NamedTuple):
    """A primitive that is wrong; which methods must be found wrong, each by the name of what errs the most."""

    primitive: str
    spoil: object
    found: dict[str, tuple[str, ...]]

    def plant(self, monkeypatch):
        # In whichever serves here.
        for backend in (eager, cpu):
            right = getattr(backend, self.primitive)
            monkeypatch.setattr(backend, self.primitive, functools.partial(self.spoil, right))


def _each(change):
    """Spoils every element of a list the primitive returns."""
    return lambda right, *args, **kwargs: [change(one) for one in right(*args, **kwargs)]


def _times(name):
    """Spoils one field of what grad_output returns for each adapter."""

    def spoil(right, *args, **kwargs):
        found = right(*args, **kwargs)
        adapters = [
            one if getattr(one, name) is None else one._replace(**{name: getattr(one, name) * OFF})
            for one in found.adapters
        ]
        return found._replace(adapters=adapters)

    return spoil


def _dot(right, *args, **kwargs):
    found = right(*args, **kwargs)
    return found if found.dot is None else found._replace(dot=found.dot * OFF)


def _no_mask(right, x, downs):
    return right(x, [down._replace(p=0.0) for down in downs])


def _no_gradient_once_frozen(right, dy, returns, *args, **kwargs):
    found = right(dy, returns, *args, **kwargs)
    adapters = [
        one._replace(dB=torch.zeros_like(one.dB))
        if back.frozen_columns and one.dB is not None
        else one
        for one, back in zip(found.adapters, returns, strict=True)
    ]
    return found._replace(adapters=adapters)


def _core_forgotten_once_frozen(right, dy, returns, *args, **kwargs):
    found = right(dy, returns, *args, **kwargs)
    adapters = [
        one._replace(d_core=one.d_core * OFF) if back.frozen_columns else one
        for one, back in zip(found.adapters, returns, strict=True)
    ]
    return found._replace(adapters=adapters)


LORA, DORA, LAMDA = "lora", "dora", "lamda"
FAULTS = {
    "h": Fault(
        "project",
        _each(lambda one: (one[0] * OFF, one[1])),
        dict.fromkeys((LORA, DORA), ("lora_B",)) | {LAMDA: ("core", "lora_B")},
    ),
    "mixed": Fault(
        "project",
        _each(lambda one: (one[0], one[1] * OFF)),
        {name: ("y",) for name in (LORA, DORA, LAMDA)},
    ),
    "mask": Fault(
        "project",
        _no_mask,
        {LORA: ("y", "lora_B"), DORA: ("y", "lora_B"), LAMDA: ("y", "lora_B", "core")},
    ),
    "y": Fault(
        "linear",
        lambda right, *args, **kwargs: (lambda y, z: (y * OFF, z))(*right(*args, **kwargs)),
        {LORA: ("y",), DORA: ("y", "magnitude"), LAMDA: ("y",)},
    ),
    "v": Fault(
        "grad_output", _times("v"), {LORA: ("lora_A", "x"), DORA: ("lora_A", "x"), LAMDA: ("x",)}
    ),
    "dB": Fault("grad_output", _times("dB"), {name: ("lora_B",) for name in (LORA, DORA, LAMDA)}),
    "d_core": Fault("grad_output", _times("d_core"), {LAMDA: ("core",)}),
    "dot": Fault("grad_output", _dot, {DORA: ("magnitude",)}),
    "dx": Fault(
        "grad_input",
        lambda right, *args: right(*args) * OFF,
        {name: ("x",) for name in (LORA, DORA, LAMDA)},
    ),
    "dA": Fault("grad_project", _each(lambda dA: dA * OFF), {LORA: ("lora_A",), DORA: ("lora_A",)}),
    "NaN": Fault(
        "grad_project", _each(lambda dA: dA * float("nan")), {LORA: ("lora_A",), DORA: ("lora_A",)}
    ),
    "norm": Fault(
        "row_norm",
        lambda right, *args, **kwargs: right(*args, **kwargs) * OFF,
        {DORA: ("y", "x", "lora_A", "lora_B")},
    ),
    "dB of live columns": Fault(
        "grad_output", _no_gradient_once_frozen, {LAMDA: ("lora_B with 2 of 4 columns frozen",)}
    ),
    "d_core once frozen": Fault(
        "grad_output",
        _core_forgotten_once_frozen,
        {LAMDA: ("core with 2 of 4 columns frozen", "core with 4 of 4 columns frozen")},
    ),
}
