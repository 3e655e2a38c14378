"""Adapters that change nothing, and ranks above the sizes of their weight: what layers warn of."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from torch import nn

from lorafast.methods.adapter import Adapter
from lorafast.methods.lora import LoRA

_UNSCALED = "alpha=0: the scaling s is 0, so A and B change nothing and get no gradient, in"
_EXCEEDING = (
    "r exceeds min(N, K), beyond which a larger r costs time and memory and allows no further "
    "change of the weight, in"
)


def size_complaints(
    layers: Iterable[tuple[str, Adapter, int, int]],
) -> list[tuple[str, list[str]]]:
    """Return each complaint about some of the layers with the names of those layers.

    layers: the name, the adapter, and N and K of the weight of each.
    """
    layers = tuple(layers)
    unscaled = [name for name, adapter, _, _ in layers if adapter.scaling == 0]
    exceeding = [
        f"{name} (r={adapter.r}, N={N}, K={K})"
        for name, adapter, N, K in layers
        if _exceeds(adapter, N, K)
    ]
    found = ((_UNSCALED, unscaled), (_EXCEEDING, exceeding))
    return [(complaint, names) for complaint, names in found if names]


def warn_about_layer(kind: type[nn.Module], adapter: Adapter | None, N: int, K: int) -> None:
    """Warn, at the caller of the function that calls this, about the adapter of one layer.

    What is no adapter is left to the layer, which refuses it.
    """
    adapter = LoRA() if adapter is None else adapter
    if not isinstance(adapter, Adapter):
        return
    for complaint, (name,) in size_complaints([(f"this {kind.__name__}", adapter, N, K)]):
        warnings.warn(f"{complaint} {name}", stacklevel=3)


def _exceeds(adapter: Adapter, N: int, K: int) -> bool:
    """True if a smaller rank reaches every product BA that this adapter reaches."""
    # VeRA's factors are random and shared by layers of all sizes: its rank is large by design.
    return adapter.r > min(N, K) and not adapter.tensor_specs(N, K)["lora_B"].shared
