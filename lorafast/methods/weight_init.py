"""The base class of initializations of A and B that depend on the weight."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch


@dataclass(frozen=True)
class WeightInit:
    """The base class of initializations of A and B from the weight: PiSSA and LoRA-GA.

    The layer subtracts s·BA from its weight, so that its output does not change at the start. A
    subclass is a frozen dataclass that defines `factors`; `LoRA(init=...)` and `DoRA(init=...)`
    take an instance.

    Example:
        from dataclasses import dataclass

        import torch, lorafast
        from lorafast.methods.weight_init import WeightInit


        @dataclass(frozen=True)
        class FirstRows(WeightInit):
            \"""A is the first r rows of the weight, B is small noise.\"""

            def factors(self, weight, r, scaling):
                return weight[:r].clone(), 0.01 * torch.randn(weight.shape[0], r)


        layer = lorafast.Linear(64, 32, adapter=lorafast.LoRA(r=4, init=FirstRows()))
    """

    def bind_layer(self, name: str, weight: torch.Tensor, r: int) -> WeightInit:
        """Return the initialization for one layer.

        Args:
            name: the name of the layer in the model; "" for a layer that is built on its own.
            weight: the weight [N, K] of the layer.
            r: the rank of the layer.

        Returns:
            This initialization, or a copy that holds what the layer needs.
        """
        return self

    def factors(
        self, weight: torch.Tensor, r: int, scaling: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the initial A and B of one layer.

        Args:
            weight: the weight [N, K], before anything is subtracted from it.
            r: the rank R.
            scaling: the scaling s.

        Returns:
            A [R, K] and B [N, R], on the weight's device.
        """
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """Return the fields that compare, by name: the settings that an adapter file records."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.compare}
