"""The base classes of the adapter configurations."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, fields
from typing import ClassVar, NamedTuple, TypeGuard

import torch

from lorafast.engine import checks
from lorafast.methods import peft_words


class TensorSpec(NamedTuple):
    """The shape and the role of one adapter tensor of a layer.

    Args:
        shape: the shape of the tensor.
        trained: True if the tensor is a parameter that requires grad.
        shared: True if all layers of a model that need a tensor of this name, shape, dtype and
            device hold the same one.

    Example:
        from lorafast.methods.adapter import TensorSpec

        frozen_A = TensorSpec((8, 64), trained=False)  # lora_A [R, K]
    """

    shape: tuple[int, ...]
    trained: bool = True
    shared: bool = False


@dataclass(frozen=True, repr=False)
class Adapter:
    """The base class of adapter configurations: immutable values that compare, copy and pickle.

    An adapter says which tensors a layer of weight [N, K] has beside the weight, which of them
    train, their initial values, and the options of the formula

        y = gain ⊙ (x Wᵀ + s · out_scale ⊙ (core(drop(x) Aᵀ) Bᵀ)) + bias

    A subclass is a frozen dataclass. It defines `tensor_specs` and `init_tensors`, and the class
    attributes `paper` (its source), `trains` (the tensors that train) and `keeps` (what is saved
    for backward beyond the frozen layer's, in elements of x's dtype).

    Args:
        r: rank R, at least 1.

    Raises:
        TypeError: an argument is unknown or has PEFT's name for it (the message gives the name
            here), or a flag is not a bool.
        ValueError: a field is out of range.

    Example:
        from dataclasses import dataclass

        import torch, lorafast


        @dataclass(frozen=True, repr=False)
        class NoisyLoRA(lorafast.LoRA):
            \"""LoRA whose B starts at noise instead of 0.\"""

            def init_tensors(self, weight):
                tensors = super().init_tensors(weight)
                return tensors | {"lora_B": 0.01 * torch.randn_like(tensors["lora_B"])}


        layer = lorafast.Linear(64, 32, adapter=NoisyLoRA(r=4))
    """

    r: int = 8

    paper: ClassVar[str]
    trains: ClassVar[str]
    keeps: ClassVar[str]
    # True if an nn.Embedding can have this adapter.
    supports_embedding: ClassVar[bool] = True
    # True if the weights [E, N, K] of experts can have this adapter, one each.
    supports_experts: ClassVar[bool] = False
    # The fields in which the layers of one model may differ: a rank or alpha pattern may set them.
    per_layer_fields: ClassVar[tuple[str, ...]] = ("r", "alpha")

    # The formula's options for methods that have no field of that name. They have no annotations,
    # because with them they would be fields of every method, before its own.
    dropout = 0.0
    axis = "out"
    dropout_on = "adapter"
    keep = "auto"
    detach_norm = True
    cache_norm = False

    def __new__(cls, *args: object, **kwargs: object) -> Adapter:
        unknown = next((name for name in kwargs if name not in cls.__dataclass_fields__), None)
        if unknown is not None and not _has_argument(cls, unknown):
            names = [field.name for field in fields(cls) if field.init]
            raise TypeError(peft_words.argument_hint(cls.__name__, unknown, names))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        checks.whole("r", self.r)
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(field.default, bool) and not isinstance(value, bool):
                raise TypeError(f"{field.name}={value!r} must be True or False")
        checks.probability(self.dropout)

    def __repr__(self) -> str:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        defaults = {field.name: field.default for field in fields(self)}
        shown = [
            f"{name}={value!r}"
            for name, value in values.items()
            if name in ("r", "alpha") or value != defaults[name]
        ]
        return f"{type(self).__name__}({', '.join(shown)})"

    @property
    def scaling(self) -> float:
        """The scaling s of the low-rank product; 1 unless a method defines it."""
        return 1.0

    @property
    def residual(self) -> bool:
        """True if the layer subtracts the initial s·BA (or s·B·core·A) from its weight."""
        return False

    def bind_model(self, shapes: list[tuple[int, int]]) -> Adapter:
        """Return the adapter for a set of layers that `lorafast.adapt` adapts together.

        Args:
            shapes: the weight shape (N, K) of each layer.

        Returns:
            This adapter, or a changed copy if the layers share tensors.
        """
        return self

    def bind_layer(self, name: str, weight: torch.Tensor) -> Adapter:
        """Return the adapter for one layer.

        Args:
            name: the name of the layer in the model; "" for a layer that is built on its own.
            weight: the weight [N, K] of the layer.

        Returns:
            This adapter, or a changed copy if the initial values depend on the layer's name.
        """
        return self

    def tensor_specs(self, N: int, K: int) -> dict[str, TensorSpec]:
        """Return the specification of every adapter tensor of a layer.

        Args:
            N: out_features.
            K: in_features.

        Returns:
            A specification per Parameter name: some of "lora_A" [R, K], "lora_B" [N, R],
            "lora_core" [R, R] or [R], "lora_magnitude" [N] or [K], "lora_out_scale" [N] and
            "lora_bias" [N].
        """
        raise NotImplementedError

    def init_tensors(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the initial value of every adapter tensor of a layer.

        Args:
            weight: the weight [N, K] of the layer.

        Returns:
            A tensor per name of `tensor_specs`, on the weight's device, in fp32 or fp64.
        """
        raise NotImplementedError


@dataclass(frozen=True, repr=False)
class ScaledAdapter(Adapter):
    """The base class of adapters with s = alpha/r, or alpha/√r with rslora (arXiv:2312.03732).

    Args:
        r: rank R, at least 1.
        alpha: numerator of s, a finite number.
        dropout: probability in [0, 1) that an element of the adapter's input is dropped.
        rslora: True for s = alpha/√r.

    Raises:
        TypeError: as in `Adapter`.
        ValueError: a field is out of range.
    """

    alpha: float = 8
    dropout: float = 0.0
    rslora: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_finite_number(self.alpha):
            raise ValueError(f"alpha={self.alpha!r} must be a finite number")

    @property
    def scaling(self) -> float:
        """The scaling s = alpha/r, or alpha/√r with rslora."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    def alpha_for(self, scaling: float) -> float:
        """Return the alpha that gives the scaling s."""
        return scaling * (math.sqrt(self.r) if self.rslora else self.r)


def _has_argument(cls: type, name: str) -> bool:
    """True if the constructor of a subclass takes an argument that is no field."""
    init = cls.__init__  # type: ignore[misc]  # a class's own, and its signature is asked for
    parameters = inspect.signature(init).parameters.values()
    return any(
        parameter.name == name or parameter.kind is parameter.VAR_KEYWORD
        for parameter in parameters
    )


def is_finite_number(value: object) -> TypeGuard[float]:
    """True for a finite int or float that is not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
