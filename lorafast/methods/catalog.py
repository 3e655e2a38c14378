"""The methods there are."""

from __future__ import annotations

from typing import NamedTuple

from lorafast.methods.adapter import Adapter
from lorafast.methods.dora import DoRA
from lorafast.methods.lamda import LaMDA
from lorafast.methods.lora import LoRA
from lorafast.methods.vera import VeRA

METHODS: tuple[type[Adapter], ...] = (LoRA, DoRA, LaMDA, VeRA)


class Method(NamedTuple):
    """name, what to call, the paper, what trains, and what is kept for backward beyond the frozen layer's."""

    name: str
    adapter: type[Adapter]
    paper: str
    trains: str
    keeps: str


def list_methods() -> list[Method]:
    """Every adapter method, in the order to read about them."""
    return [Method(a.__name__.lower(), a, a.paper, a.trains, a.keeps) for a in METHODS]
