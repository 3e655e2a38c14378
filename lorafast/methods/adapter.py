"""What every adapter spec is: numbers that can be compared, copied and pickled, and the tensors a layer starts with."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import ClassVar, NamedTuple

import torch

from lorafast.engine import checks

# What PEFT users type, and what it is called here.
_OTHER_NAMES = {
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "use_rslora": "rslora",
    "init_lora_weights": "init",
    "use_dora": "lorafast.DoRA(...)",
    "rank": "r",
}


class TensorSpec(NamedTuple):
    """One adapter tensor of a layer: its shape, whether it trains, and whether layers of one model hold it in common."""

    shape: tuple[int, ...]
    trained: bool = True
    shared: bool = False


@dataclass(frozen=True, repr=False)
class Adapter:
    """r: rank. What a method does not say otherwise: s = 1, no dropout, and the settings below."""

    r: int = 8

    paper: ClassVar[str]
    trains: ClassVar[str]
    keeps: ClassVar[str]
    # Whether a lookup table (nn.Embedding) can have this adapter.
    embeds: ClassVar[bool] = True
    # In what the layers of one model may differ: what a rank or alpha pattern may set.
    per_layer: ClassVar[tuple[str, ...]] = ("r", "alpha")

    # What the formula runs with unless a method has a field for it. Annotated, they would take a field's place in its order.
    dropout = 0.0
    axis = "out"
    dropout_on = "adapter"
    keep = "auto"
    detach_norm = True
    cache_norm = False

    def __new__(cls, *args: object, **kwargs: object) -> Adapter:
        for name in kwargs:
            if name in _OTHER_NAMES:
                raise TypeError(
                    f"{cls.__name__}({name}=...): this is spelled {_OTHER_NAMES[name]} in lorafast"
                )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        checks.whole("r", self.r)
        for field in fields(self):
            if isinstance(field.default, bool) and not isinstance(getattr(self, field.name), bool):
                raise TypeError(f"{field.name}={getattr(self, field.name)!r} must be True or False")
        checks.probability(self.dropout)

    def __repr__(self) -> str:
        told = [
            f
            for f in fields(self)
            if f.name in ("r", "alpha") or getattr(self, f.name) != f.default
        ]
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in told)})"

    @property
    def scaling(self) -> float:
        """s."""
        return 1.0

    @property
    def residual(self) -> bool:
        """Whether the weight gives up, at the start, the delta the adapter already makes."""
        return False

    def bind_model(self, shapes: list[tuple[int, int]]) -> Adapter:
        """The adapter for layers of these shapes (N, K) together; another one only where they share tensors."""
        return self

    def bind_layer(self, name: str, weight: torch.Tensor) -> Adapter:
        """The adapter for the layer of this name ("" where it has none) and weight [N,K]; another one only where its start depends
        on the layer.
        """
        return self

    def tensor_specs(self, N: int, K: int) -> dict[str, TensorSpec]:
        """The adapter tensors of a layer with weight [N,K], by the name of their Parameter, one of adapted.NAMES."""
        raise NotImplementedError

    def init_tensors(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """First values for every part, by name, on the weight's device."""
        raise NotImplementedError


@dataclass(frozen=True, repr=False)
class Scaled(Adapter):
    """s = alpha/r, or alpha/√r with rslora (arXiv 2312.03732). dropout: on the adapter's input."""

    alpha: float = 8
    dropout: float = 0.0
    rslora: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if (
            isinstance(self.alpha, bool)
            or not isinstance(self.alpha, int | float)
            or not math.isfinite(self.alpha)
        ):
            raise ValueError(f"alpha={self.alpha!r} must be a finite number")

    @property
    def scaling(self) -> float:
        """s = alpha/r, or alpha/√r with rslora."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    def alpha_for(self, scaling: float) -> float:
        """The alpha that gives this s."""
        return scaling * (math.sqrt(self.r) if self.rslora else self.r)
