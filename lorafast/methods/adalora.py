"""AdaLoRA, adaptive budget allocation (arXiv:2303.10512): the adapter of a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lorafast.engine import checks
from lorafast.methods.adapter import Adapter, TensorSpec, is_finite_number

_INIT_STD = 0.02
# PEFT adds it to the rank in the denominator of the scaling.
_RANK_EPS = 1e-5


@dataclass(frozen=True, repr=False)
class AdaLoRA(Adapter):
    """AdaLoRA: an SVD-like product of triplets, whose number per layer a schedule reduces.

        y = x Wᵀ + s ((E ⊙ (drop(x) Aᵀ)) Bᵀ) + bias        s = alpha / (init_r + 1e-5)

    A triplet is a row of A [R, K], an entry of E [R] (the layer's core) and a column of B [N, R];
    all train. `schedule.AdaLoRA` distributes one budget of triplets over all layers: a triplet out
    of the budget has E = 0 until `schedule.AdaLoRA.resize` removes it. A and B start from
    N(0, 0.02²), E at 0, so that the output is unchanged at the start. s always counts the initial
    triplets, as in PEFT. Saved for backward: x by reference and M·R elements of drop(x) Aᵀ.

    Args:
        r: number of triplets of a layer, at least 1 and at most init_r.
        target_r: final number of triplets of a layer, on average over the layers; at most init_r.
        alpha: numerator of the scaling s, a finite number above 0, the same in all layers.
        dropout: probability in [0, 1) that an element of the adapter's input is dropped.
        init_r: the rank in the scaling s. None for r; a layer of a rank pattern, or one after a
            resize, has an r below init_r.

    Raises:
        TypeError: an argument has PEFT's name for it.
        ValueError: a field is out of range.

    Example:
        import torch, lorafast

        model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8))
        lorafast.adapt(model, lorafast.AdaLoRA(r=6, target_r=4))
        schedule = lorafast.schedule.AdaLoRA(model, total_steps=100)

    Source:
        arXiv:2303.10512
    """

    r: int = 12
    target_r: int = 8
    alpha: float = 8
    dropout: float = 0.0
    init_r: int | None = None

    paper: ClassVar[str] = "arXiv 2303.10512"
    trains: ClassVar[str] = "A, core (diagonal), B"
    keeps: ClassVar[str] = "x by reference + M·R"
    supports_embedding: ClassVar[bool] = False
    per_layer_fields: ClassVar[tuple[str, ...]] = ("r",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_r is None:
            object.__setattr__(self, "init_r", self.r)
        for name in ("target_r", "init_r"):
            checks.whole(name, getattr(self, name))
        for name in ("r", "target_r"):
            if getattr(self, name) > self._scaling_rank:
                raise ValueError(
                    f"{name}={getattr(self, name)} must be at most init_r={self.init_r}: "
                    "a budget only shrinks"
                )
        if not is_finite_number(self.alpha) or self.alpha <= 0:
            raise ValueError(f"alpha={self.alpha!r} must be a finite number above 0")

    @property
    def scaling(self) -> float:
        """The scaling s = alpha/(init_r + 1e-5)."""
        return self.alpha / (self._scaling_rank + _RANK_EPS)

    def alpha_for(self, scaling: float) -> float:
        """Return the alpha that gives the scaling s."""
        return scaling * (self._scaling_rank + _RANK_EPS)

    @property
    def _scaling_rank(self) -> int:
        return self.r if self.init_r is None else self.init_r

    def tensor_specs(self, N: int, K: int) -> dict[str, TensorSpec]:
        return {
            "lora_A": TensorSpec((self.r, K)),
            "lora_B": TensorSpec((N, self.r)),
            "lora_core": TensorSpec((self.r,)),
        }

    def init_tensors(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        N, K = weight.shape
        return {
            "lora_A": torch.empty(self.r, K, device=weight.device).normal_(std=_INIT_STD),
            "lora_B": torch.empty(N, self.r, device=weight.device).normal_(std=_INIT_STD),
            "lora_core": torch.zeros(self.r, device=weight.device),
        }
