"""LoRA, low-rank adaptation (arXiv:2106.09685), and rank-stabilized LoRA (arXiv:2312.03732)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from lorafast.methods import peft_words
from lorafast.methods.adapter import ScaledAdapter, TensorSpec
from lorafast.methods.weight_init import WeightInit

INITS = ("kaiming", "gaussian")


@dataclass(frozen=True, repr=False)
class LoRA(ScaledAdapter):
    """LoRA: a trained low-rank product beside a frozen weight.

        y = x Wᵀ + s (drop(x) Aᵀ) Bᵀ + bias        s = alpha/r, or alpha/√r with rslora

    x [M, K] and W [N, K]; A [R, K] and B [N, R] train. Saved for backward: x by reference and M·R
    elements of drop(x) Aᵀ; with freeze_A (LoRA-FA, arXiv:2308.03303) the M·R elements alone.

    Args:
        r: rank R, at least 1. PEFT's default, as all defaults here.
        alpha: numerator of the scaling s, a finite number.
        dropout: probability in [0, 1) that an element of the adapter's input is dropped.
        rslora: True for s = alpha/√r (rank-stabilized LoRA).
        init: "kaiming": A from U(-1/√K, 1/√K) and B = 0. "gaussian": A from N(0, 1/r²) and B = 0.
            Or `PiSSA()` or `LoRAGA(gradients)`, which also change the weight.
        freeze_A: True if A does not train.
        lora_bias: True for a trained bias [N] of B, which starts at 0.

    Raises:
        TypeError: an argument has PEFT's name for it (`lora_alpha`, `lora_dropout`, …), or a flag
            is not a bool.
        ValueError: a field is out of range, or alpha ≤ 0 with an init that changes the weight.

    Example:
        import torch, lorafast

        layer = lorafast.Linear(64, 32, adapter=lorafast.LoRA(r=8, alpha=16, dropout=0.05))
        layer(torch.randn(4, 64)).sum().backward()

    Source:
        arXiv:2106.09685; rslora: arXiv:2312.03732; freeze_A: arXiv:2308.03303
    """

    init: str | WeightInit = "kaiming"
    freeze_A: bool = False
    lora_bias: bool = False

    paper: ClassVar[str] = "arXiv 2106.09685"
    trains: ClassVar[str] = "A, B"
    keeps: ClassVar[str] = "x by reference + M·R (freeze_A: M·R)"
    supports_experts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.init, WeightInit):
            _check_init(self.init)
        elif self.alpha <= 0:
            raise ValueError(
                f"alpha={self.alpha!r} must be positive for init={self.init!r}, "
                "which takes s·BA out of the weight"
            )

    @property
    def residual(self) -> bool:
        return isinstance(self.init, WeightInit)

    def bind_layer(self, name: str, weight: torch.Tensor) -> LoRA:
        if not isinstance(self.init, WeightInit):
            return self
        init = self.init.bind_layer(name, weight, self.r)
        return self if init is self.init else replace(self, init=init)

    def tensor_specs(self, N: int, K: int) -> dict[str, TensorSpec]:
        specs = {
            "lora_A": TensorSpec((self.r, K), trained=not self.freeze_A),
            "lora_B": TensorSpec((N, self.r)),
        }
        if self.lora_bias:
            specs["lora_bias"] = TensorSpec((N,))
        return specs

    def init_tensors(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        N, K = weight.shape
        if isinstance(self.init, WeightInit):
            A, B = self.init.factors(weight, self.r, self.scaling)
        else:
            A = torch.empty(self.r, K, device=weight.device)
            B = torch.zeros(N, self.r, device=weight.device)
            if self.init == "kaiming":
                bound = 1 / math.sqrt(max(K, 1))
                A.uniform_(-bound, bound)
            else:
                A.normal_(std=1 / self.r)
        tensors = {"lora_A": A, "lora_B": B}
        if self.lora_bias:
            tensors["lora_bias"] = torch.zeros(N, device=weight.device)
        return tensors


def _check_init(init: object) -> None:
    """Raise ValueError if the init is not one of the words, with what PEFT's word is here."""
    if not isinstance(init, str) or init not in INITS:
        raise ValueError(
            f"init={init!r} must be one of {', '.join(map(repr, INITS))}, or PiSSA(...) or "
            f"LoRAGA(...){peft_words.init_hint(init)}"
        )
