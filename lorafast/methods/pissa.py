"""PiSSA, principal singular values and singular vectors adaptation (arXiv:2404.02948)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lorafast.methods import svd
from lorafast.methods.weight_init import WeightInit


@dataclass(frozen=True)
class PiSSA(WeightInit):
    """PiSSA: an initialization of A and B from the principal singular triplets of the weight.

        W = U Σ Vᵀ        A = √(Σ_r/s) V_rᵀ        B = U_r √(Σ_r/s)        W becomes W - s B A

    V_r, Σ_r and U_r are the r largest triplets. A [R, K] and B [N, R] train; the output is
    unchanged at the start, up to the rounding of W - s B A to the weight's dtype. Nothing more than
    LoRA's tensors is saved for backward. `lorafast.save_adapter` writes a LoRA of rank 2r for the
    untouched weight: `s (B A - B₀ A₀) = s [B, -B₀] [A; A₀]`.

    Args:
        svd_niter: None for an exact SVD up to min(N, K) = 1024 and 16 subspace iterations above it;
            0 for an exact SVD; n > 0 for n subspace iterations.

    Raises:
        ValueError: svd_niter is neither None nor an integer in 0…100.

    Example:
        import torch, lorafast

        model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8))
        lorafast.adapt(model, lorafast.LoRA(r=4, alpha=4, init=lorafast.PiSSA()))

    Source:
        arXiv:2404.02948
    """

    svd_niter: int | None = None

    paper: ClassVar[str] = "arXiv 2404.02948"
    trains: ClassVar[str] = "A, B"
    keeps: ClassVar[str] = "x by reference + M·R"

    def __post_init__(self) -> None:
        svd.check_niter(self.svd_niter)

    def factors(
        self, weight: torch.Tensor, r: int, scaling: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        U, S, Vh = svd.truncated_svd(weight, r, self.svd_niter)
        root = (S / scaling).sqrt()
        return root[:, None] * Vh, U * root
