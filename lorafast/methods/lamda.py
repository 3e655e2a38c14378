"""LaMDA, spectrally decomposed low-dimensional adaptation (arXiv:2406.12832)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from lorafast.engine import checks
from lorafast.methods import svd
from lorafast.methods.adapter import ScaledAdapter, TensorSpec
from lorafast.methods.lora import LoRA

INITS = ("residual", "zero", "repo")


@dataclass(frozen=True, repr=False)
class LaMDA(ScaledAdapter):
    """LaMDA: a frozen A, a trained R×R core, and a B whose columns freeze during training.

        y = x Wᵀ + s ((drop(x) Aᵀ) Sᵀ) Bᵀ + bias        s = alpha/r, or alpha/√r with rslora

    A [R, K] is frozen, the core S [R, R] trains, B [N, R] trains until `schedule.LaMDAFreeze` has
    frozen its columns. Saved for backward: M·R elements of h = drop(x) Aᵀ, and never x; h Sᵀ is
    computed again.

    The paper's text was not available for two points: the initial value of S, and whether the
    weight loses the initial s B S A. `init` offers three readings.

    Args:
        r: rank R, at least 1; at most min(N, K) unless init is "repo".
        alpha: numerator of the scaling s, a finite number; not 0 with init="residual".
        dropout: probability in [0, 1) that an element of the adapter's input is dropped.
        rslora: True for s = alpha/√r.
        init: "residual": A = V_rᵀ, B = U_r and S = Σ_r/s from the SVD of W, and W becomes
            W - s B S A, so that the output is unchanged at the start. "zero": A = V_rᵀ, B = U_r,
            S = 0, and W does not change. "repo": as in the authors' released code, A
            kaiming-uniform, B = 0 and S from U(-1/√r, 1/√r), without an SVD.
        svd_niter: None for an exact SVD up to min(N, K) = 1024 and 16 subspace iterations above it;
            0 for an exact SVD; n > 0 for n subspace iterations.

    Raises:
        TypeError: an argument has PEFT's name for it, or rslora is not a bool.
        ValueError: a field is out of range.

    Example:
        import torch, lorafast

        model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8))
        lorafast.adapt(model, lorafast.LaMDA(r=4))
        schedule = lorafast.schedule.LaMDAFreeze(model, total_steps=100)

    Source:
        arXiv:2406.12832
    """

    init: str = "residual"
    svd_niter: int | None = None

    paper: ClassVar[str] = "arXiv 2406.12832"
    trains: ClassVar[str] = "core; B until frozen"
    keeps: ClassVar[str] = "M·R"
    supports_experts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.word("init", self.init, INITS)
        svd.check_niter(self.svd_niter)
        if self.init == "residual" and self.alpha == 0:
            raise ValueError(
                "alpha=0 leaves nothing for init='residual' to take out of the weight; "
                "use init='zero'"
            )

    @property
    def residual(self) -> bool:
        return self.init == "residual"

    def tensor_specs(self, N: int, K: int) -> dict[str, TensorSpec]:
        return {
            "lora_A": TensorSpec((self.r, K), trained=False),
            "lora_B": TensorSpec((N, self.r)),
            "lora_core": TensorSpec((self.r, self.r)),
        }

    def init_tensors(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        core = torch.zeros(self.r, self.r, device=weight.device)
        if self.init == "repo":
            core.uniform_(-1 / math.sqrt(self.r), 1 / math.sqrt(self.r))
            return LoRA(self.r).init_tensors(weight) | {"lora_core": core}
        U, S, Vh = svd.truncated_svd(weight, self.r, self.svd_niter)
        if self.residual:
            core = torch.diag(S / self.scaling)
        return {"lora_A": Vh, "lora_B": U, "lora_core": core}
