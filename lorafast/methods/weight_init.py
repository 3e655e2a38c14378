"""Starts that read the weight: what init may be besides a word."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch


class WeightInit:
    """A start of A and B from the weight, after which the weight gives up what they make of it: W becomes W - sBA."""

    def bind_layer(self, name: str, weight: torch.Tensor, r: int) -> WeightInit:
        """The start of the layer of this name ("" where it has none), weight [N,K] and rank r. A frozen dataclass, as any start."""
        return self

    def factors(
        self, weight: torch.Tensor, r: int, scaling: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A [r,K] and B [N,r] for weight [N,K], on its device."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """What tells two starts of a kind apart, tensors left out: what a file says of it."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.compare}
