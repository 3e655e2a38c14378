"""PiSSA (arXiv 2404.02948): LoRA that starts from the principal part of the weight and leaves it the rest.

    W = U Σ Vᵀ;  A = √(Σ_r/s) V_rᵀ,  B = U_r √(Σ_r/s),  W becomes W - s B A: the start is exact, A and B train
An init, asked for as LoRA(init=PiSSA()) or DoRA(init=PiSSA()); nothing more is saved for backward. On disk it is
a LoRA of rank 2r for the untouched weight: s (B A - B₀ A₀) = s [B, -B₀] [A; A₀].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lorafast.methods import svd
from lorafast.methods.weight_init import WeightInit


@dataclass(frozen=True)
class PiSSA(WeightInit):
    """svd_niter: None exact up to min(N,K) = 1024, else 16 subspace iterations; 0 always exact."""

    svd_niter: int | None = None

    paper: ClassVar[str] = "arXiv 2404.02948"
    trains: ClassVar[str] = "A, B"
    keeps: ClassVar[str] = "x by reference + M·R"

    def __post_init__(self) -> None:
        svd.iterations(self.svd_niter)

    def factors(
        self, weight: torch.Tensor, r: int, scaling: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        U, S, Vh = svd.top(weight, r, self.svd_niter)
        root = (S / scaling).sqrt()
        return root[:, None] * Vh, U * root
