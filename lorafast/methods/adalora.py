"""AdaLoRA (arXiv 2303.10512): triplets (row of A, entry of E, column of B) under one budget that all layers share.

    y = x Wᵀ + s ((E ⊙ (drop(x) Aᵀ)) Bᵀ) + bias,  s = alpha/(init_r + 1e-5)      A [R,K], E [R], B [N,R] trained, W frozen
Saved for backward: x by reference + M·R of drop(x) Aᵀ. E is the layer's core. A and B start from N(0, 0.02²), E at 0: no change.
schedule.AdaLoRA shares the budget out: a triplet it takes away has an E of 0, until schedule.resize() drops it altogether. s always
counts the triplets the layers began with, and its 1e-5 is PEFT's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from lorafast.engine import checks
from lorafast.methods.adapter import Adapter, TensorSpec

_STD = 0.02


@dataclass(frozen=True, repr=False)
class AdaLoRA(Adapter):
    """r: triplets a layer has now. target_r: how many it is to have at the end, on average over the layers. alpha: above 0.
    init_r: what s counts, r itself unless said; a layer of rank_pattern, or after a resize, has fewer. alpha is the same for all.
    """

    r: int = 12
    target_r: int = 8
    alpha: float = 8
    dropout: float = 0.0
    init_r: int | None = None

    paper: ClassVar[str] = "arXiv 2303.10512"
    trains: ClassVar[str] = "A, core (diagonal), B"
    keeps: ClassVar[str] = "x by reference + M·R"
    embeds: ClassVar[bool] = False
    per_layer: ClassVar[tuple[str, ...]] = ("r",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_r is None:
            object.__setattr__(self, "init_r", self.r)
        for name in ("target_r", "init_r"):
            checks.whole(name, getattr(self, name))
        for name in ("r", "target_r"):
            if getattr(self, name) > self.init_r:
                raise ValueError(
                    f"{name}={getattr(self, name)} must be at most init_r={self.init_r}: a budget only shrinks"
                )
        alpha = self.alpha
        if (
            isinstance(alpha, bool)
            or not isinstance(alpha, int | float)
            or not math.isfinite(alpha)
            or alpha <= 0
        ):
            raise ValueError(f"alpha={alpha!r} must be a finite number above 0")

    @property
    def scaling(self) -> float:
        """s = alpha/(init_r + 1e-5)."""
        return self.alpha / (self.init_r + 1e-5)

    def alpha_for(self, scaling: float) -> float:
        """The alpha that gives this s."""
        return scaling * (self.init_r + 1e-5)

    def tensor_specs(self, N: int, K: int) -> dict[str, TensorSpec]:
        return {
            "lora_A": TensorSpec((self.r, K)),
            "lora_B": TensorSpec((N, self.r)),
            "lora_core": TensorSpec((self.r,)),
        }

    def init_tensors(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        N, K = weight.shape
        return {
            "lora_A": torch.empty(self.r, K, device=weight.device).normal_(std=_STD),
            "lora_B": torch.empty(N, self.r, device=weight.device).normal_(std=_STD),
            "lora_core": torch.zeros(self.r, device=weight.device),
        }
