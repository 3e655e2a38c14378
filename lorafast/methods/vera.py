"""VeRA, vector-based random matrix adaptation (arXiv:2310.11454)."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from lorafast.methods.adapter import Adapter, TensorSpec, is_finite_number


@dataclass(frozen=True, repr=False)
class VeRA(Adapter):
    """VeRA: two trained vectors per layer around random projections that all layers share.

        y = x Wᵀ + λ_b ⊙ ((λ_d ⊙ (drop(x) Aᵀ)) Bᵀ) + bias

    A [R, K] and B [N, R] are frozen and shared; λ_d [R] (the layer's core) and λ_b [N] (its
    out_scale, which starts at 0) train. There is no alpha. A and B are the first K columns and the
    first N rows of one pair for the largest layer, drawn from U(-√(6/fan_in), √(6/fan_in)) as PEFT
    draws them from the same key. Saved for backward: M·R elements of drop(x) Aᵀ.

    Args:
        r: rank R, at least 1, the same in all layers of a model.
        d_initial: the initial value of λ_d, a finite number.
        projection_prng_key: seed of A and B, in [0, 2⁶³).
        dropout: probability in [0, 1) that an element of the adapter's input is dropped.
        largest: shape (N, K) of the largest layer that shares A and B. None for the layer's own
            shape; `lorafast.adapt` sets the model's.

    Raises:
        TypeError: an argument has PEFT's name for it.
        ValueError: a field is out of range, or a layer is larger than `largest`.

    Example:
        import torch, lorafast

        model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8))
        lorafast.adapt(model, lorafast.VeRA(r=16))

    Source:
        arXiv:2310.11454
    """

    r: int = 256
    d_initial: float = 0.1
    projection_prng_key: int = 0
    dropout: float = 0.0
    largest: tuple[int, int] | None = None

    paper: ClassVar[str] = "arXiv 2310.11454"
    trains: ClassVar[str] = "core (diagonal), out_scale"
    keeps: ClassVar[str] = "M·R"
    supports_embedding: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_finite_number(self.d_initial):
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
            "lora_A": TensorSpec((self.r, K), trained=False, shared=True),
            "lora_B": TensorSpec((N, self.r), trained=False, shared=True),
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


def projections(r: int, N: int, K: int, key: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the shared A [r, K] and B [N, r] of a key, fp32 on the CPU.

    They depend on the arguments alone, not on torch's default dtype. A is drawn before B, as in
    PEFT. The last pair is cached, because every layer of a model asks for it.
    """
    # A mode that replaces tensors, such as FakeTensorMode, must not leave its own in the cache.
    plain = type(torch.empty(0, device="cpu")) is torch.Tensor
    return _cached_projections(r, N, K, key) if plain else _draw_projections(r, N, K, key)


def _draw_projections(r: int, N: int, K: int, key: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(key)
    A = torch.empty(r, K, device="cpu", dtype=torch.float32)
    B = torch.empty(N, r, device="cpu", dtype=torch.float32)
    for tensor in (A, B):
        bound = math.sqrt(6 / tensor.shape[1])
        tensor.uniform_(-bound, bound, generator=generator)
    return A, B


_cached_projections = functools.lru_cache(maxsize=1)(_draw_projections)
