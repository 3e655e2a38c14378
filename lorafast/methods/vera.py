"""VeRA (arXiv 2310.11454): random projections that all layers share, and two trained vectors each.

    y = x Wᵀ + λ_b ⊙ ((λ_d ⊙ (drop(x) Aᵀ)) Bᵀ) + bias      A [R,K], B [N,R] frozen and shared, λ_d [R] and λ_b [N] trained
Saved for backward: M·R. λ_d is the layer's core, λ_b its out_scale; there is no alpha. A and B are the first K columns and
N rows of one pair drawn for the largest layer, from U(±√(6/fan_in)), as PEFT draws them from the same key.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from lorafast.methods.adapter import Adapter, TensorSpec


@dataclass(frozen=True, repr=False)
class VeRA(Adapter):
    """d_initial: first value of λ_d (λ_b starts at 0). projection_prng_key: seed of A and B.
    largest: (N, K) of the pair they are cut from; None is the layer's own, and lorafast.adapt puts the model's.
    """

    r: int = 256
    d_initial: float = 0.1
    projection_prng_key: int = 0
    dropout: float = 0.0
    largest: tuple[int, int] | None = None

    paper: ClassVar[str] = "arXiv 2310.11454"
    trains: ClassVar[str] = "core (diagonal), out_scale"
    keeps: ClassVar[str] = "M·R"
    embeds: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if (
            isinstance(self.d_initial, bool)
            or not isinstance(self.d_initial, int | float)
            or not math.isfinite(self.d_initial)
        ):
            raise ValueError(f"d_initial={self.d_initial!r} must be a finite number")
        key = self.projection_prng_key
        if isinstance(key, bool) or not isinstance(key, int) or not 0 <= key < 1 << 63:
            raise ValueError(f"projection_prng_key={key!r} must be an integer in [0, 2**63)")

    def bind_model(self, shapes: list[tuple[int, int]]) -> VeRA:
        return replace(self, largest=(max(N for N, _ in shapes), max(K for _, K in shapes)))

    def tensor_specs(self, N: int, K: int) -> dict[str, TensorSpec]:
        largest = self.largest or (N, K)
        if largest[0] < N or largest[1] < K:
            raise ValueError(f"largest={largest} has no room for a weight {(N, K)}")
        return {
            "lora_A": TensorSpec((self.r, K), False, shared=True),
            "lora_B": TensorSpec((N, self.r), False, shared=True),
            "lora_core": TensorSpec((self.r,)),
            "lora_out_scale": TensorSpec((N,)),
        }

    def init_tensors(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        N, K = weight.shape
        A, B = projections(self.r, *(self.largest or (N, K)), self.projection_prng_key)
        return {
            "lora_A": A[:, :K].to(weight.device),
            "lora_B": B[:N].to(weight.device),
            "lora_core": torch.full((self.r,), float(self.d_initial), device=weight.device),
            "lora_out_scale": torch.zeros(N, device=weight.device),
        }


@functools.lru_cache(maxsize=1)
def projections(r: int, N: int, K: int, key: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A [r,K] and B [N,r] on the CPU, drawn in that order. The last pair is kept: a model asks for it once a layer."""
    generator = torch.Generator().manual_seed(key)
    A, B = torch.empty(r, K, device="cpu"), torch.empty(N, r, device="cpu")
    for tensor in (A, B):
        bound = math.sqrt(6 / tensor.shape[1])
        tensor.uniform_(-bound, bound, generator=generator)
    return A, B
