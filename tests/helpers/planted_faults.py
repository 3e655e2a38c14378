"""Faults to plant in the six primitives, one output at a time. The bench must find each of them."""

import functools
from typing import NamedTuple

import torch

from lorafast.engine import host
from lorafast.engine.backends import cpu, eager

# The factor of a wrong result.
OFF = 1.01


class Fault(NamedTuple):
    """A wrong primitive.

    spoil: called with the correct primitive and its arguments, it returns the wrong result.
    found: for each method that must be wrong, the tensors of which one must have the worst error.
    """

    primitive: str
    spoil: object
    found: dict[str, tuple[str, ...]]

    def plant(self, monkeypatch):
        """Replace the primitive in both backends that run on a CPU; calls come there by Python."""
        monkeypatch.setattr(host, "linear", host._declined)
        for backend in (eager, cpu):
            right = getattr(backend, self.primitive)
            spoiled = functools.partial(self.spoil, right)
            monkeypatch.setattr(backend, self.primitive, spoiled)


def _each(change):
    """Return a fault that changes every element of the returned list."""
    return lambda right, *args, **kwargs: [change(one) for one in right(*args, **kwargs)]


def _adapters(change):
    """Return a fault that changes what grad_output returns for each adapter.

    change: called with the adapter's gradients and its UpProjGradSpec.
    """

    def spoil(right, dy, specs, *args, **kwargs):
        grads = right(dy, specs, *args, **kwargs)
        pairs = zip(grads.adapters, specs, strict=True)
        return grads._replace(adapters=[change(one, spec) for one, spec in pairs])

    return spoil


def _scaled(name):
    """Return a change that scales one gradient."""

    def change(grads, spec):
        value = getattr(grads, name)
        return grads if value is None else grads._replace(**{name: value * OFF})

    return change


def _zero_dB_once_frozen(grads, spec):
    if not spec.frozen_columns or grads.dB is None:
        return grads
    return grads._replace(dB=torch.zeros_like(grads.dB))


def _scaled_d_core_once_frozen(grads, spec):
    return grads._replace(d_core=grads.d_core * OFF) if spec.frozen_columns else grads


def _scaled_dot(right, *args, **kwargs):
    grads = right(*args, **kwargs)
    return grads if grads.dot is None else grads._replace(dot=grads.dot * OFF)


def _no_dropout(right, x, downs):
    return right(x, [down._replace(p=0.0) for down in downs])


def _scaled_y(right, *args, **kwargs):
    y, z = right(*args, **kwargs)
    return y * OFF, z


def _scaled_result(right, *args, **kwargs):
    return right(*args, **kwargs) * OFF


LORA, DORA, LAMDA = "lora", "dora", "lamda"
ALL = (LORA, DORA, LAMDA)
FAULTS = {
    "h": Fault(
        "project",
        _each(lambda pair: (pair[0] * OFF, pair[1])),
        dict.fromkeys((LORA, DORA), ("lora_B",)) | {LAMDA: ("core", "lora_B")},
    ),
    "h_core": Fault(
        "project",
        _each(lambda pair: (pair[0], pair[1] * OFF)),
        # DoRA's d_magnitude is computed from y.
        {LORA: ("y",), DORA: ("y", "magnitude"), LAMDA: ("y",)},
    ),
    "mask": Fault(
        "project",
        _no_dropout,
        dict.fromkeys((LORA, DORA), ("y", "lora_B")) | {LAMDA: ("y", "lora_B", "core")},
    ),
    "y": Fault("linear", _scaled_y, {LORA: ("y",), DORA: ("y", "magnitude"), LAMDA: ("y",)}),
    "v": Fault(
        "grad_output",
        _adapters(_scaled("v")),
        dict.fromkeys((LORA, DORA), ("lora_A", "x")) | {LAMDA: ("x",)},
    ),
    "dB": Fault("grad_output", _adapters(_scaled("dB")), dict.fromkeys(ALL, ("lora_B",))),
    "d_core": Fault("grad_output", _adapters(_scaled("d_core")), {LAMDA: ("core",)}),
    "dot": Fault("grad_output", _scaled_dot, {DORA: ("magnitude",)}),
    "dx": Fault("grad_input", _scaled_result, dict.fromkeys(ALL, ("x",))),
    "dA": Fault(
        "grad_project", _each(lambda dA: dA * OFF), dict.fromkeys((LORA, DORA), ("lora_A",))
    ),
    "NaN": Fault(
        "grad_project",
        _each(lambda dA: dA * float("nan")),
        dict.fromkeys((LORA, DORA), ("lora_A",)),
    ),
    "norm": Fault("row_norm", _scaled_result, {DORA: ("y", "x", "lora_A", "lora_B")}),
    "dB of live columns": Fault(
        "grad_output",
        _adapters(_zero_dB_once_frozen),
        {LAMDA: ("lora_B with 2 of 4 columns frozen",)},
    ),
    "d_core once frozen": Fault(
        "grad_output",
        _adapters(_scaled_d_core_once_frozen),
        {LAMDA: ("core with 2 of 4 columns frozen", "core with 4 of 4 columns frozen")},
    ),
}
