"""DoRA (arXiv 2402.09353): the direction of W + sBA and its length trained apart.

    y = gain⊙(x Wᵀ + s (drop(x) Aᵀ) Bᵀ) + bias,  gain = m/‖W+sBA‖ per output row       A, B and m [N] trained, W frozen
axis="in" (the dim=0 variant in circulation): the norm runs down each input column and gain [K] scales x instead.
Saved for backward: x by reference + M·R + what `keep` says for d_m = Σ dy⊙z / norm:
    "output" y by reference, "inner" z [M,N] rounded once, "recompute" nothing and one more GEMM.
magnitude_only=True (§5.6): y = gain⊙(x Wᵀ) + bias,  gain = m/‖W‖, m alone trained. What the op wants as A and B is one row and one
column of zeros, which do not train and whose gradients are 0 anyway: in a file this is a DoRA of rank 1. Saved: what `keep` says,
and neither x nor h (with "recompute" both; with axis="in" x).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from lorafast import functional
from lorafast.engine import checks
from lorafast.methods.adapter import TensorSpec
from lorafast.methods.lora import LoRA


@dataclass(frozen=True, repr=False)
class DoRA(LoRA):
    """LoRA's fields, and: axis "out"|"in"; dropout_on "adapter" (one base GEMM) or "both" (PEFT's reading: two each way);
    keep "auto" ("output" without bias in bf16/fp32, else "inner"); detach_norm=False for the exact gradient; cache_norm=True
    keeps the norm across gradient accumulation. Where m is 0, keep="output" gives d_m = 0, the others the true one.
    magnitude_only=True trains m alone; r and alpha are then 1 whatever is given, and what else speaks of A and B is refused.
    """

    axis: str = "out"
    dropout_on: str = "adapter"
    keep: str = "auto"
    detach_norm: bool = True
    cache_norm: bool = False
    magnitude_only: bool = False

    paper: ClassVar[str] = "arXiv 2402.09353"
    trains: ClassVar[str] = "A, B, magnitude"
    keeps: ClassVar[str] = "x by reference + M·R + y by reference, z or nothing (keep)"

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.words(self.axis, self.dropout_on, self.keep, self.dropout)
        if self.magnitude_only:
            plain = self._without_factors()
            if said := [
                f"{name}={getattr(self, name)!r}"
                for name, value in plain.items()
                if getattr(self, name) != value
            ]:
                raise ValueError(f"magnitude_only=True: there are no factors for {', '.join(said)}")
            for name in ("r", "alpha"):
                object.__setattr__(self, name, 1)

    def alone(self) -> DoRA:
        """The adapter that trains the magnitude only, and is otherwise this one."""
        return replace(self, magnitude_only=True, **self._without_factors())

    def _without_factors(self) -> dict[str, object]:
        """What the fields are that speak of factors, where there are none."""
        dropout = {} if self.dropout_on == "both" else {"dropout": 0.0}
        return {"init": "kaiming", "freeze_A": False, "lora_bias": False, "rslora": False} | dropout

    def tensor_specs(self, N: int, K: int) -> dict[str, TensorSpec]:
        factors = super().tensor_specs(N, K)
        if self.magnitude_only:
            factors = {name: part._replace(trained=False) for name, part in factors.items()}
        return factors | {"lora_magnitude": TensorSpec((N if self.axis == "out" else K,))}

    def init_tensors(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.magnitude_only:
            zeros = {
                name: torch.zeros(part.shape, device=weight.device)
                for name, part in super().tensor_specs(*weight.shape).items()
            }
            norm = functional.row_norm(weight, zeros["lora_A"], zeros["lora_B"], axis=self.axis)
            return zeros | {"lora_magnitude": norm}
        tensors = super().init_tensors(weight)
        # After a start that changes W, W + sBA is what W was.
        B = torch.zeros_like(tensors["lora_B"]) if self.residual else tensors["lora_B"]
        norm = functional.row_norm(
            weight, tensors["lora_A"], B, scaling=self.scaling, axis=self.axis
        )
        return tensors | {"lora_magnitude": norm}
