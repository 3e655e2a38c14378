"""Every method there is: what it is called, its paper, what trains, what is kept for backward, and how to ask for it."""

from __future__ import annotations

from typing import NamedTuple

from lorafast.methods.adalora import AdaLoRA
from lorafast.methods.adapter import Adapter
from lorafast.methods.aflora import AFLoRA
from lorafast.methods.dora import DoRA
from lorafast.methods.lamda import LaMDA
from lorafast.methods.lora import LoRA
from lorafast.methods.lora_ga import LoRAGA
from lorafast.methods.pissa import PiSSA
from lorafast.methods.vera import VeRA
from lorafast.optim import GaLore, LoRAAsOptimizer, LoRAFA, LoRAPlus, LoRAPro
from lorafast.schedule import LISA

KINDS = ("adapter", "start", "ranks", "optimizer", "schedule")


class Method(NamedTuple):
    """kind: one of KINDS; adapter: the spec that carries it, None where the weights themselves train.

    keeps: for backward beyond the frozen layer's, in elements of x's dtype; then what an optimizer of its own holds. ask: the code.
    """

    name: str
    adapter: type[Adapter] | None
    paper: str
    trains: str
    keeps: str
    kind: str
    ask: str


def _adapter(made: type[Adapter], ask: str) -> Method:
    return Method(made.__name__.lower(), made, made.paper, made.trains, made.keeps, "adapter", ask)


def _variant(
    name: str, made: type[Adapter], ask: str, kind: str = "adapter", **other: str
) -> Method:
    return _adapter(made, ask)._replace(name=name, kind=kind, **other)


def _start(name: str, made: type, ask: str) -> Method:
    return Method(name, LoRA, made.paper, made.trains, made.keeps, "start", ask)


def _steps(name: str, made: type, layer: str, ask: str) -> Method:
    return Method(
        name, LoRA, made.paper, made.trains, f"{layer}; optimizer: {made.keeps}", "optimizer", ask
    )


def _whole(name: str, made: type, kind: str, ask: str) -> Method:
    return Method(name, None, made.paper, made.trains, made.keeps, kind, ask)


_ALONE = {"trains": "magnitude", "keeps": "y by reference, z, or x by reference + M·R (keep)"}
_BOTH = "x by reference + M·R"
_SPREAD = "adapt(model, LaMDA(r=16), rank_pattern=spectral_ranks(model)), schedule.LaMDAFreeze(model, total_steps)"

METHODS = (
    _adapter(LoRA, "LoRA(r=16)"),
    _variant("rslora", LoRA, "LoRA(r=16, rslora=True)", paper="arXiv 2312.03732"),
    _start("pissa", PiSSA, "LoRA(r=16, init=PiSSA())"),
    _start("lora-ga", LoRAGA, "LoRA(r=16, init=LoRAGA(estimate_gradients(model, batches, loss_fn)))"),
    _steps("lora+", LoRAPlus, _BOTH, "LoRA(r=16), optim.LoRAPlus(model, torch.optim.AdamW, lr=lr, ratio=16)"),
    _steps("lora-pro", LoRAPro, _BOTH, "LoRA(r=16), optim.LoRAPro(model, lr)"),
    _steps("lora-fa", LoRAFA, "M·R", "LoRA(r=16, freeze_A=True), optim.LoRAFA(model, lr)"),
    _adapter(DoRA, "DoRA(r=16)"),
    _variant("dora-exact", DoRA, "DoRA(r=16, detach_norm=False)"),
    _variant("dora-magnitude", DoRA, "DoRA(magnitude_only=True)", **_ALONE),
    _adapter(LaMDA, "LaMDA(r=16), schedule.LaMDAFreeze(model, total_steps)"),
    _variant("lamda++", LaMDA, _SPREAD, "ranks"),
    _adapter(VeRA, "VeRA(r=256)"),
    _adapter(AdaLoRA, "AdaLoRA(r=12, target_r=8), schedule.AdaLoRA(model, total_steps)"),
    _adapter(AFLoRA, "AFLoRA(r=4), schedule.AFLoRA(model, total_steps)"),
    _whole("galore", GaLore, "optimizer", "optim.GaLore(model, lr, rank=128)"),
    _whole("lora-as-optimizer", LoRAAsOptimizer, "optimizer", "optim.LoRAAsOptimizer(model, torch.optim.AdamW, lr, r=16)"),
    _whole("lisa", LISA, "schedule", 'schedule.LISA(model, layers="model.layers", active=2)'),
)  # fmt: skip


def list_methods() -> list[Method]:
    """Every method, in the order to read about them."""
    return list(METHODS)
