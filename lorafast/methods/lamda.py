"""LaMDA (arXiv 2406.12832): a frozen way down, a trained r×r core, and a way up that freezes column by column.

    y = x Wᵀ + s ((drop(x) Aᵀ) Sᵀ) Bᵀ + bias        A [R,K] frozen, S (core) [R,R] trained, B [N,R] trained, later frozen
Saved for backward: M·R of h = drop(x) Aᵀ; x never, and h Sᵀ is remade. schedule.LaMDAFreeze freezes B's columns.

How the paper starts S, and whether W gives up what B S A already says, could not be checked against its text; three readings:
    "residual"  A = V_rᵀ, B = U_r, S = Σ_r/s from the SVD of W, and W becomes W - s B S A: the start is exact, W changes
    "zero"      A = V_rᵀ, B = U_r, S = 0: W is untouched
    "repo"      what the authors' released code does: A kaiming, B = 0, S uniform ±1/√r, no SVD
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from lorafast.engine import checks
from lorafast.methods import svd
from lorafast.methods.adapter import Scaled, TensorSpec
from lorafast.methods.lora import LoRA

INITS = ("residual", "zero", "repo")


@dataclass(frozen=True, repr=False)
class LaMDA(Scaled):
    """init as above. svd_niter: None exact up to min(N,K) = 1024, else 16 subspace iterations; 0 always exact."""

    init: str = "residual"
    svd_niter: int | None = None

    paper: ClassVar[str] = "arXiv 2406.12832"
    trains: ClassVar[str] = "core; B until frozen"
    keeps: ClassVar[str] = "M·R"

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.word("init", self.init, INITS)
        svd.iterations(self.svd_niter)
        if self.init == "residual" and self.alpha == 0:
            raise ValueError(
                "alpha=0 leaves nothing for init='residual' to take out of the weight; use init='zero'"
            )

    @property
    def residual(self) -> bool:
        return self.init == "residual"

    def tensor_specs(self, N: int, K: int) -> dict[str, TensorSpec]:
        return {
            "lora_A": TensorSpec((self.r, K), False),
            "lora_B": TensorSpec((N, self.r)),
            "lora_core": TensorSpec((self.r, self.r)),
        }

    def init_tensors(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        core = torch.zeros(self.r, self.r, device=weight.device)
        if self.init == "repo":
            core.uniform_(-1 / math.sqrt(self.r), 1 / math.sqrt(self.r))
            return LoRA(self.r).init_tensors(weight) | {"lora_core": core}
        U, S, Vh = svd.top(weight, self.r, self.svd_niter)
        if self.residual:
            core = torch.diag(S / self.scaling)
        return {"lora_A": Vh, "lora_B": U, "lora_core": core}
