"""AFLoRA, adaptive freezing of low-rank adaptation (arXiv:2403.13269): the adapter of a layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from lorafast.methods.adapter import Adapter, TensorSpec, is_finite_number


@dataclass(frozen=True, repr=False)
class AFLoRA(Adapter):
    """AFLoRA: two trained vectors around a low-rank pair that trains until a schedule freezes it.

        y = x Wᵀ + λ_b ⊙ ((λ_d ⊙ (drop(x) Aᵀ)) Bᵀ) + bias

    A [R, K] and B [N, R] train until `schedule.AFLoRA` freezes them, each at its own step; λ_d [R]
    (the layer's core) and λ_b [N] (its out_scale) always train. There is no alpha. Saved for
    backward: x by reference and M·R elements of drop(x) Aᵀ while A trains, the M·R elements alone
    once it is frozen.

    The initial values could not be checked against the paper's text. λ_b = 0 leaves the output
    unchanged at the start. The authors' scripts also start with λ_b = 0, with A and B from
    U(-√(6/fan_in), √(6/fan_in)) as here, and with λ_d = 0.1. For N = K their code never trains A
    and B; set requires_grad to False on both to do the same.

    Args:
        r: rank R, at least 1.
        d_initial: the initial value of λ_d, a finite number.
        dropout: probability in [0, 1) that an element of the adapter's input is dropped.

    Raises:
        TypeError: an argument has PEFT's name for it.
        ValueError: a field is out of range.

    Example:
        import torch, lorafast

        model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8))
        lorafast.adapt(model, lorafast.AFLoRA(r=4))
        schedule = lorafast.schedule.AFLoRA(model, total_steps=100)

    Source:
        arXiv:2403.13269
    """

    r: int = 4
    d_initial: float = 1.0
    dropout: float = 0.0

    paper: ClassVar[str] = "arXiv 2403.13269"
    trains: ClassVar[str] = "core (diagonal), out_scale; A and B until frozen"
    keeps: ClassVar[str] = "x by reference + M·R (A frozen: M·R)"
    supports_embedding: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_finite_number(self.d_initial):
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
        A = torch.empty(self.r, K, device=weight.device)
        B = torch.empty(N, self.r, device=weight.device)
        for tensor in (A, B):
            bound = math.sqrt(6 / max(tensor.shape[1], 1))
            tensor.uniform_(-bound, bound)
        return {
            "lora_A": A,
            "lora_B": B,
            "lora_core": torch.full((self.r,), float(self.d_initial), device=weight.device),
            "lora_out_scale": torch.zeros(N, device=weight.device),
        }
