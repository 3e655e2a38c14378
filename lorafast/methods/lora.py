"""LoRA (arXiv 2106.09685), and with rslora=True rank-stabilised LoRA (arXiv 2312.03732).

    y = x Wᵀ + s (drop(x) Aᵀ) Bᵀ + bias,  s = alpha/r or alpha/√r          A [R,K], B [N,R] trained, W frozen
Saved for backward: x by reference + M·R; with freeze_A (LoRA-FA, arXiv 2308.03303) M·R alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from lorafast.engine import checks
from lorafast.methods.adapter import Scaled, TensorSpec
from lorafast.methods.weight_init import WeightInit

INITS = ("kaiming", "gaussian")


@dataclass(frozen=True, repr=False)
class LoRA(Scaled):
    """PEFT's defaults. init: A from U(±1/√K) ("kaiming") or N(0, 1/r²) ("gaussian"), B = 0; or PiSSA() or
    LoRAGA(gradients), which change W. lora_bias: a trained bias on B.
    """

    init: str | WeightInit = "kaiming"
    freeze_A: bool = False
    lora_bias: bool = False

    paper: ClassVar[str] = "arXiv 2106.09685"
    trains: ClassVar[str] = "A, B"
    keeps: ClassVar[str] = "x by reference + M·R (freeze_A: M·R)"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.residual:
            checks.word("init", self.init, INITS)
        elif self.alpha <= 0:
            raise ValueError(
                f"alpha={self.alpha!r} must be positive for init={self.init!r}, which takes s·BA out of the weight"
            )

    @property
    def residual(self) -> bool:
        return isinstance(self.init, WeightInit)

    def bind_layer(self, name: str, weight: torch.Tensor) -> LoRA:
        init = self.init.bind_layer(name, weight, self.r) if self.residual else self.init
        return self if init is self.init else replace(self, init=init)

    def tensor_specs(self, N: int, K: int) -> dict[str, TensorSpec]:
        parts = {
            "lora_A": TensorSpec((self.r, K), not self.freeze_A),
            "lora_B": TensorSpec((N, self.r)),
        }
        return parts | ({"lora_bias": TensorSpec((N,))} if self.lora_bias else {})

    def init_tensors(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        N, K = weight.shape
        bias = {"lora_bias": torch.zeros(N, device=weight.device)} if self.lora_bias else {}
        if self.residual:
            A, B = self.init.factors(weight, self.r, self.scaling)
            return {"lora_A": A, "lora_B": B} | bias
        A = torch.empty(self.r, K, device=weight.device)
        if self.init == "kaiming":
            bound = 1 / math.sqrt(max(K, 1))
            A.uniform_(-bound, bound)
        else:
            A.normal_(std=1 / self.r)
        return {"lora_A": A, "lora_B": torch.zeros(N, self.r, device=weight.device)} | bias
