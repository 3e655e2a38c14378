"""The table of all methods: paper, what trains, what is saved for backward, how to use each."""

from __future__ import annotations

from typing import Any, NamedTuple

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
    """One method of the table.

    Args:
        name: the name in the table, in the bench's `--methods` and in the documentation.
        adapter: the class of the adapter that the method uses; None if the weights themselves
            train.
        paper: the source, such as "arXiv 2106.09685".
        trains: the tensors that train.
        keeps: what is saved for backward beyond the frozen layer's, in elements of x's dtype; for
            an optimizer of its own, also its state.
        kind: "adapter", "start" (an initialization), "ranks" (a choice of ranks), "optimizer" or
            "schedule".
        ask: the code that uses the method.

    Example:
        import lorafast

        papers = {method.name: method.paper for method in lorafast.list_methods()}
        assert papers["dora"] == "arXiv 2402.09353"
    """

    name: str
    adapter: type[Adapter] | None
    paper: str
    trains: str
    keeps: str
    kind: str
    ask: str


def _adapter(cls: type[Adapter], ask: str) -> Method:
    return Method(cls.__name__.lower(), cls, cls.paper, cls.trains, cls.keeps, "adapter", ask)


def _variant(name: str, cls: type[Adapter], ask: str, **changes: Any) -> Method:
    return _adapter(cls, ask)._replace(name=name, **changes)


def _init(name: str, cls: Any, ask: str) -> Method:
    return Method(name, LoRA, cls.paper, cls.trains, cls.keeps, "start", ask)


def _optimizer(name: str, cls: Any, layer_keeps: str, ask: str) -> Method:
    keeps = f"{layer_keeps}; optimizer: {cls.keeps}"
    return Method(name, LoRA, cls.paper, cls.trains, keeps, "optimizer", ask)


def _whole_weights(name: str, cls: Any, kind: str, ask: str) -> Method:
    return Method(name, None, cls.paper, cls.trains, cls.keeps, kind, ask)


_MAGNITUDE_KEEPS = "y by reference, z, or x by reference + M·R (keep)"
_FACTORS_KEEP = "x by reference + M·R"

METHODS = (
    _adapter(LoRA, "LoRA(r=16)"),
    _variant("rslora", LoRA, "LoRA(r=16, rslora=True)", paper="arXiv 2312.03732"),
    _init("pissa", PiSSA, "LoRA(r=16, init=PiSSA())"),
    _init(
        "lora-ga",
        LoRAGA,
        "LoRA(r=16, init=LoRAGA(estimate_gradients(model, batches, loss_fn)))",
    ),
    _optimizer(
        "lora+",
        LoRAPlus,
        _FACTORS_KEEP,
        "LoRA(r=16), optim.LoRAPlus(model, torch.optim.AdamW, lr=lr, ratio=16)",
    ),
    _optimizer("lora-pro", LoRAPro, _FACTORS_KEEP, "LoRA(r=16), optim.LoRAPro(model, lr)"),
    _optimizer("lora-fa", LoRAFA, "M·R", "LoRA(r=16, freeze_A=True), optim.LoRAFA(model, lr)"),
    _adapter(DoRA, "DoRA(r=16)"),
    _variant("dora-exact", DoRA, "DoRA(r=16, detach_norm=False)"),
    _variant(
        "dora-magnitude",
        DoRA,
        "DoRA(magnitude_only=True)",
        trains="magnitude",
        keeps=_MAGNITUDE_KEEPS,
    ),
    _adapter(LaMDA, "LaMDA(r=16), schedule.LaMDAFreeze(model, total_steps)"),
    _variant(
        "lamda++",
        LaMDA,
        "adapt(model, LaMDA(r=16), rank_pattern=spectral_ranks(model)), "
        "schedule.LaMDAFreeze(model, total_steps)",
        kind="ranks",
    ),
    _adapter(VeRA, "VeRA(r=256)"),
    _adapter(AdaLoRA, "AdaLoRA(r=12, target_r=8), schedule.AdaLoRA(model, total_steps)"),
    _adapter(AFLoRA, "AFLoRA(r=4), schedule.AFLoRA(model, total_steps)"),
    _whole_weights("galore", GaLore, "optimizer", "optim.GaLore(model, lr, rank=128)"),
    _whole_weights(
        "lora-as-optimizer",
        LoRAAsOptimizer,
        "optimizer",
        "optim.LoRAAsOptimizer(model, torch.optim.AdamW, lr, r=16)",
    ),
    _whole_weights(
        "lisa", LISA, "schedule", 'schedule.LISA(model, layers="model.layers", active=2)'
    ),
)


def list_methods() -> list[Method]:
    """Return all methods, in the order of the documentation.

    Returns:
        A new list of `Method` tuples, with the fields name, adapter, paper, trains, keeps, kind and
        ask.

    Example:
        import lorafast

        for method in lorafast.list_methods():
            print(method.name, method.paper, method.ask)
    """
    return list(METHODS)
