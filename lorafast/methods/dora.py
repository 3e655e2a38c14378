"""DoRA (arXiv 2402.09353): the direction of W + sBA and its length trained apart.

    y = gain⊙(x Wᵀ + s (drop(x) Aᵀ) Bᵀ) + bias,  gain = m/‖W+sBA‖ per output row       A, B and m [N] trained, W frozen
axis="in" (the dim=0 variant in circulation): the norm runs down each input column and gain [K] scales x instead.
Saved for backward: x by reference + M·R + what `keep` says for d_m = Σ dy⊙z / norm:
    "output" y by reference, "inner" z [M,N] rounded once, "recompute" nothing and one more GEMM.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lorafast import checks, functional
from lorafast.methods.adapter import Part
from lorafast.methods.lora import LoRA


@dataclass(frozen=True, repr=False)
class DoRA(LoRA):
    """LoRA's fields, and: axis "out"|"in"; dropout_on "adapter" (one base GEMM) or "both" (PEFT's reading: two each way);
    keep "auto" ("output" without bias in bf16/fp32, else "inner"); detach_norm=False for the exact gradient; cache_norm=True
    keeps the norm across gradient accumulation. Where m is 0, keep="output" gives d_m = 0, the others the true one.
    """

    axis: str = "out"
    dropout_on: str = "adapter"
    keep: str = "auto"
    detach_norm: bool = True
    cache_norm: bool = False

    paper: ClassVar[str] = "arXiv 2402.09353"
    trains: ClassVar[str] = "A, B, magnitude"
    keeps: ClassVar[str] = "x by reference + M·R + y by reference, z or nothing (keep)"

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.words(self.axis, self.dropout_on, self.keep, self.dropout)

    def parts(self, N: int, K: int) -> dict[str, Part]:
        return super().parts(N, K) | {"lora_magnitude": Part((N if self.axis == "out" else K,))}

    def start(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        tensors = super().start(weight)
        # After a start that changes W, W + sBA is what W was.
        B = torch.zeros_like(tensors["lora_B"]) if self.residual else tensors["lora_B"]
        norm = functional.row_norm(weight, tensors["lora_A"], B, scaling=self.scaling, axis=self.axis)
        return tensors | {"lora_magnitude": norm}
