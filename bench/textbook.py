"""What the papers say: which factors a method trains, and its layer as the eager chain, to be held against and to be timed."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

from lorafast.engine import philox
from lorafast.testing import Case, Form, chain

_PAIR = frozenset({"lora_A", "lora_B"})
# By the papers that lorafast.list_methods names. Read from no implementation: what forgets a factor is no witness.
TRAINS = {
    **dict.fromkeys(("lora", "rslora", "pissa", "lora-ga", "lora+", "lora-pro"), _PAIR),
    **dict.fromkeys(("dora", "dora-exact"), _PAIR | {"magnitude"}),
    **dict.fromkeys(("lamda", "lamda++"), frozenset({"core", "lora_B"})),
    "dora-magnitude": frozenset({"magnitude"}),
    "lora-fa": frozenset({"lora_B"}),
    "vera": frozenset({"core", "out_scale"}),
    "adalora": _PAIR | {"core"},
    "aflora": _PAIR | {"core", "out_scale"},
}


NAMES = ("weight", "bias", "lora_A", "lora_B", "core", "magnitude", "out_scale", "lora_bias")


class EagerLinear(nn.Module):
    """One adapted layer as stock ops, on the base's and the parts' own Parameters: x [...,K] -> [...,N].

    masked: it drops what lorafast drops from the same generator, to be judged; else by torch's own dropout, to be timed.
    frozen: how many of lora_B's columns get no gradient.
    """

    def __init__(
        self, form: Form, scaling: float, dropout: float, base: nn.Linear, parts: dict[str, nn.Parameter],
        masked: bool = True, frozen: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        (N, K), R = base.weight.shape, parts["lora_A"].shape[0]
        self._case = Case(
            form, 0, N, K, R, base.weight.dtype, dropout, base.bias is not None, scaling
        )
        self._masked, self._frozen = masked, frozen
        held = {"weight": base.weight, "bias": base.bias} | parts
        for name in NAMES:
            self.register_parameter(name, held.get(name))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        t = {name: getattr(self, name) for name in NAMES}
        t |= {"x": x, "seed": None, "lora_B": frozen_columns(self.lora_B, self._frozen)}
        if not self._masked:
            return chain(self._case, t, lambda x: F.dropout(x, self._case.dropout, self.training))
        t |= {"x": x.flatten(0, -2), "seed": philox.draw(x.device) if self._case.dropout else None}
        return chain(self._case, t).unflatten(0, x.shape[:-1])


def frozen_columns(B: torch.Tensor, count: int) -> torch.Tensor:
    """B [N,R], no gradient for its first `count` columns."""
    return torch.cat((B[:, :count].detach(), B[:, count:]), 1) if count else B


def replaced(
    model: nn.Module,
    layers: dict[str, EagerLinear],
    trains: frozenset[str],
    whole: bool,
    wide: bool,
) -> nn.Module:
    """A copy of the model, in float64 if wide, with these layers, by their path, put in. `trains` of them train, and the head; if
    `whole`, everything.
    """
    copied = copy.deepcopy(model)
    for path, layer in layers.items():
        parent, _, child = path.rpartition(".")
        setattr(copied.get_submodule(parent), child, copy.deepcopy(layer))
    for name, parameter in copied.named_parameters():
        path, _, leaf = name.rpartition(".")
        parameter.requires_grad_(whole or path == "head" or (path in layers and leaf in trains))
    return copied.double() if wide else copied
