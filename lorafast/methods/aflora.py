"""AFLoRA (arXiv 2403.13269): VeRA's two vectors around a low-rank pair of the layer's own, which trains until it freezes.

    y = x Wᵀ + λ_b ⊙ ((λ_d ⊙ (drop(x) Aᵀ)) Bᵀ) + bias     A [R,K], B [N,R] trained, later frozen; λ_d [R] and λ_b [N] trained
Saved for backward: x by reference + M·R while A trains, M·R from then on. λ_d is the layer's core, λ_b its out_scale; there is no
alpha. schedule.AFLoRA freezes A and B, each when its score says so.

How the vectors start could not be checked against the paper's text. λ_b = 0 leaves W as it was; the authors' scripts start so too,
with λ_d = 0.1, and A and B from U(±√(6/fan_in)), as here. (Where N = K their code never trains A and B: freeze them by hand.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from lorafast.methods.adapter import Adapter, TensorSpec


@dataclass(frozen=True, repr=False)
class AFLoRA(Adapter):
    """d_initial: first value of λ_d (λ_b starts at 0). dropout: on the adapter's input."""

    r: int = 4
    d_initial: float = 1.0
    dropout: float = 0.0

    paper: ClassVar[str] = "arXiv 2403.13269"
    trains: ClassVar[str] = "core (diagonal), out_scale; A and B until frozen"
    keeps: ClassVar[str] = "x by reference + M·R (A frozen: M·R)"
    embeds: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if (
            isinstance(self.d_initial, bool)
            or not isinstance(self.d_initial, int | float)
            or not math.isfinite(self.d_initial)
        ):
            raise ValueError(f"d_initial={self.d_initial!r} must be a finite number")

    def tensor_specs(self, N: int, K: int) -> dict[str, TensorSpec]:
        return {
            "lora_A": TensorSpec((self.r, K)),
            "lora_B": TensorSpec((N, self.r)),
            "lora_core": TensorSpec((self.r,)),
            "lora_out_scale": TensorSpec((N,)),
        }

    def init_tensors(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        N, K = weight.shape
        A, B = (
            torch.empty(self.r, K, device=weight.device),
            torch.empty(N, self.r, device=weight.device),
        )
        for tensor in (A, B):
            bound = math.sqrt(6 / max(tensor.shape[1], 1))
            tensor.uniform_(-bound, bound)
        core = torch.full((self.r,), float(self.d_initial), device=weight.device)
        return {
            "lora_A": A,
            "lora_B": B,
            "lora_core": core,
            "lora_out_scale": torch.zeros(N, device=weight.device),
        }
