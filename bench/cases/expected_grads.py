"""The parameters each method trains by its paper, and its layer as a chain of stock torch ops."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

from lorafast.bench.cases import quantised_base
from lorafast.bench.measure.correctness import detach_columns
from lorafast.engine import philox
from lorafast.testing import Case, Form, chain

_PAIR = frozenset({"lora_A", "lora_B"})
# By the papers that lorafast.list_methods names, and from no implementation: a table derived from
# lorafast's code would not show a parameter that the code forgets.
TRAINED = {
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
    """An adapted layer as stock torch ops, on the Parameters it is given. x [...,K] -> [...,N]

    seeded_dropout: use the mask lorafast draws from the same generator, to compare results; if
    False, use torch's dropout, to measure time.
    frozen_columns: the number of columns of lora_B that get no gradient.
    """

    def __init__(
        self,
        form: Form,
        scaling: float,
        dropout: float,
        base: nn.Linear,
        adapter: dict[str, nn.Parameter],
        seeded_dropout: bool = True,
        frozen_columns: int = 0,
    ) -> None:
        super().__init__()
        (N, K), R = base.weight.shape, adapter["lora_A"].shape[0]
        has_bias = base.bias is not None
        self._case = Case(form, 0, N, K, R, base.weight.dtype, dropout, has_bias, scaling)
        self._seeded_dropout, self._frozen_columns = seeded_dropout, frozen_columns
        held = {"weight": base.weight, "bias": base.bias} | adapter
        for name in NAMES:
            self.register_parameter(name, held.get(name))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's output for x [...,K]."""
        t = {name: getattr(self, name) for name in NAMES}
        t |= {"x": x, "seed": None, "lora_B": detach_columns(self.lora_B, self._frozen_columns)}
        if not self._seeded_dropout:
            return chain(self._case, t, lambda x: F.dropout(x, self._case.dropout, self.training))
        # lorafast's masks depend on the row of the flattened x.
        t["x"] = x.flatten(0, -2)
        if self._case.dropout:
            t["seed"] = philox.draw_seed(x.device)
        return chain(self._case, t).unflatten(0, x.shape[:-1])


def with_eager_layers(
    model: nn.Module,
    layers: dict[str, EagerLinear],
    trained: frozenset[str],
    trains_base: bool,
    float64: bool,
) -> nn.Module:
    """Return a copy of the model in which these layers, keyed by path, replace its own.

    Quantised layers that are left become dense. The head trains, and of each layer the parameters
    named in `trained`; with trains_base everything does.
    """
    copied = copy.deepcopy(model)
    for path, layer in layers.items():
        parent, _, child = path.rpartition(".")
        setattr(copied.get_submodule(parent), child, copy.deepcopy(layer))
    quantised_base.make_dense(copied)
    for name, parameter in copied.named_parameters():
        path, _, leaf = name.rpartition(".")
        trains = trains_base or path == "head" or (path in layers and leaf in trained)
        parameter.requires_grad_(trains)
    return copied.double() if float64 else copied
