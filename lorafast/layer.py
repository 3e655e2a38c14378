"""lorafast.Linear: torch.nn.Linear with an adapter, its base frozen."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from lorafast import checks, fold, functional, norm
from lorafast.methods.adapter import Adapter
from lorafast.methods.lora import LoRA
from lorafast.problem import Scaling, Settings, Tensors

# Every adapter tensor a layer can hold; those its adapter has no part for are None.
NAMES = ("lora_A", "lora_B", "lora_core", "lora_magnitude", "lora_out_scale", "lora_bias")


class _Merged(NamedTuple):
    """What unmerge needs: the factors as they were folded, the bias, and with keep=True the weight itself on the CPU."""

    factors: Tensors
    bias: torch.Tensor | None
    weight: torch.Tensor | None


class Linear(nn.Linear):
    """y = gain⊙(x Wᵀ + s·h' Bᵀ) + bias, the formula of lorafast.linear, with `adapter` saying what of it there is.

    Parameters: weight [N,K] and bias [N], frozen; lora_A [R,K], lora_B [N,R], and by method lora_core [R,R], lora_magnitude
    [N] or [K], lora_bias [N]. adapter_dtype=None: fp32 factors on a bf16 or fp16 base, else the base's dtype.
    A state dict without adapter keys loads under strict and starts the adapter anew; one with some of them is an error. On the
    meta device the adapter starts when a plain state dict arrives. eval() never merges.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        adapter: Adapter | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._attach(LoRA() if adapter is None else adapter, adapter_dtype)

    @classmethod
    def from_linear(cls, linear: nn.Linear, adapter: Adapter | None = None, adapter_dtype: torch.dtype | None = None) -> Linear:
        """The linear's own weight and bias Parameters, frozen, with an adapter. An init that changes W says so: W is shared."""
        if not isinstance(linear, nn.Linear) or isinstance(linear, Linear):
            raise TypeError(f"linear must be a plain torch.nn.Linear, not {type(linear).__name__}")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = linear.in_features, linear.out_features
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.training = linear.training
        layer._attach(LoRA() if adapter is None else adapter, adapter_dtype)
        if layer._residual:
            warnings.warn(
                f"{layer.adapter}: the weight {tuple(layer.weight.shape)} shared with the linear now holds the residual",
                stacklevel=2,
            )
        return layer

    def _attach(self, adapter: Adapter, adapter_dtype: torch.dtype | None) -> None:
        if not isinstance(adapter, Adapter):
            raise TypeError(f"adapter must be a lorafast adapter such as lorafast.LoRA(r=8), not {adapter!r}")
        checks.pair("weight", self.weight, "[N, K]")
        half = self.weight.dtype in (torch.bfloat16, torch.float16)
        dtype = adapter_dtype or (torch.float32 if half else self.weight.dtype)
        if not dtype.is_floating_point:
            raise TypeError(f"adapter_dtype {dtype} must be a floating dtype")
        self.adapter, self.scaling = adapter, adapter.scaling
        self.frozen_columns = 0
        self._merged: _Merged | None = None
        self._residual = False
        parts = adapter.parts(self.out_features, self.in_features)
        for name in NAMES:
            part = parts.get(name)
            empty = None if part is None else torch.empty(part.shape, device=self.weight.device, dtype=dtype)
            self.register_parameter(name, None if part is None else nn.Parameter(empty, requires_grad=part.trained))
        self.reset_adapter()
        # Last, so that an adapter that refuses its weight leaves the caller's linear as it was.
        for base in (self.weight, self.bias):
            if base is not None:
                base.requires_grad_(False)

    @property
    def r(self) -> int:
        """The rank."""
        return self.adapter.r

    @property
    def core(self) -> nn.Parameter | None:
        """The r×r (or diagonal) core between the two factors."""
        return self.lora_core

    @property
    def magnitude(self) -> nn.Parameter | None:
        """DoRA's length per output row (or input column)."""
        return self.lora_magnitude

    @property
    def out_scale(self) -> nn.Parameter | None:
        """The factor on each output of the adapter."""
        return self.lora_out_scale

    @property
    def merged(self) -> bool:
        """Whether the weight holds the adapter."""
        return self._merged is not None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._merged is not None:
            return F.linear(x, self.weight, self.bias)
        a = self.adapter
        gain_norm = None
        if self.lora_magnitude is not None and not (a.detach_norm and not a.cache_norm):
            gain_norm = self._norm()
        return functional.linear(
            x, self.weight, self.bias, self.lora_A, self.lora_B, self.lora_core, self.lora_magnitude, gain_norm, a.axis,
            self.lora_out_scale, self.lora_bias, self.scaling, a.dropout, a.dropout_on, a.keep, self.frozen_columns,
            training=self.training,
        )  # fmt: skip

    def _norm(self) -> torch.Tensor:
        exact = not self.adapter.detach_norm and torch.is_grad_enabled()
        cache = not exact and (self.adapter.cache_norm or not (self.training or torch.is_grad_enabled()))
        return functional.row_norm(
            self.weight,
            self.lora_A,
            self.lora_B,
            self.lora_core,
            self.lora_out_scale,
            self.scaling,
            self.adapter.axis,
            not exact,
            cache,
        )

    @torch.no_grad()
    def reset_adapter(self) -> None:
        """Start the adapter anew from the weight: magnitude and SVD inits are derived again.

        Where the init took its delta out of the weight, the adapter's present delta goes back in first, so no part of W is lost.
        """
        if self._merged is not None:
            raise RuntimeError("the layer is merged: unmerge() before reset_adapter()")
        if self.weight.is_meta:
            return
        if self._residual:
            fold.add(self._tensors(), self._settings())
        start = self.adapter.start(self.weight.detach())
        for name, value in start.tensors.items():
            held = getattr(self, name)
            if held.is_meta:
                fresh = torch.empty(held.shape, dtype=held.dtype, device=self.weight.device)
                held = nn.Parameter(fresh, requires_grad=held.requires_grad)
                setattr(self, name, held)
            held.copy_(value)
        self.frozen_columns = 0
        self._residual = start.residual
        if start.residual:
            fold.subtract(self._tensors(), self._settings())
        norm.forget(self.lora_B)

    @torch.no_grad()
    def merge(self, keep: bool = False) -> None:
        """Fold the adapter into the weight, in place. keep=True copies W to the CPU, and unmerge() is then bitwise.

        keep=False unmerges to within ½ulp(W')/|gain| + ½ulp(W) (twice that for a gain in float64, which has nothing wider to
        compute in), and refuses a gain of 0. Merging twice is merging once.
        """
        if self._merged is not None:
            return
        if self.weight.is_meta:
            raise RuntimeError(f"weight {tuple(self.weight.shape)} is on the meta device: load it before merge()")
        if self.lora_bias is not None and self.bias is None:
            raise ValueError(f"lora_bias {tuple(self.lora_bias.shape)} cannot be merged into a layer without a bias")
        t, c = self._tensors(), self._settings()
        if t.magnitude is not None:
            t = t._replace(norm=functional.row_norm(t.weight, t.lora_A, t.lora_B, t.core, t.out_scale, self.scaling, c.axis))
        if not keep and not fold.invertible(t, c):
            raise ValueError(f"magnitude {tuple(t.magnitude.shape)} has zeros, which no unmerge() can undo; use merge(keep=True)")
        factors = Tensors(None, *(None if part is None else part.detach().clone() for part in t[1:]))
        weight = self.weight.detach().to("cpu", copy=True) if keep else None
        if self.lora_bias is not None:
            gain = norm.gain(t.magnitude, t.norm)
            low = self.lora_bias.double() * self.scaling
            self.bias.copy_(self.bias.double() + (low if gain is None or c.axis == "in" else low * gain))
        fold.fold(t, c)
        self._merged = _Merged(factors, factors.bias, weight)
        norm.forget(self.lora_B)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take out what merge() folded in, whatever has happened to the factors since. Without a merge() nothing happens."""
        if self._merged is None:
            return
        factors, bias, weight = self._merged
        if weight is not None:
            self.weight.copy_(weight)
        else:
            here = (None if part is None else part.to(self.weight.device) for part in factors[1:])
            fold.unfold(Tensors(self.weight, *here), self._settings())
        if bias is not None:
            self.bias.copy_(bias)
        self._merged = None

    def train(self, mode: bool = True) -> Linear:
        """As torch's; a cached norm is forgotten."""
        norm.forget(self._parameters.get("lora_B"))
        return super().train(mode)

    def extra_repr(self) -> str:
        merged = ", merged" if self.merged else ""
        return f"{super().extra_repr()}, adapter={self.adapter}{merged}"

    def _apply(self, fn, recurse: bool = True):
        norm.forget(self._parameters.get("lora_B"))
        return super()._apply(fn, recurse)

    def _tensors(self) -> Tensors:
        return Tensors(
            self.weight, self.bias, self.lora_A, self.lora_B, self.lora_core, self.lora_magnitude, None,
            self.lora_out_scale, self.lora_bias, None, self.scaling if isinstance(self.scaling, torch.Tensor) else None,
        )  # fmt: skip

    def _settings(self) -> Settings:
        scaling: Scaling = self.scaling
        return Settings(1.0 if isinstance(scaling, torch.Tensor) else float(scaling), axis=self.adapter.axis)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if self._merged is not None:
            raise RuntimeError(
                f"{prefix}weight is merged: together with the adapter beside it, it would apply the delta twice; unmerge() first"
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        held = [name for name in NAMES if getattr(self, name) is not None]
        given = [name for name in held if prefix + name in state_dict]
        if self._merged is not None:
            errors.append(f"{prefix}weight: the layer is merged; unmerge() before loading")
        elif given and len(given) < len(held):
            absent = ", ".join(prefix + name for name in held if name not in given)
            errors.append(f"{prefix}* holds part of an adapter: {absent} missing for {self.adapter}")
        elif given or prefix + "weight" not in state_dict:
            super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
            norm.forget(self.lora_B)
        else:
            before = len(errors)
            lacking: list[str] = []
            super()._load_from_state_dict(state_dict, prefix, metadata, strict, lacking, unexpected, errors)
            missing.extend(key for key in lacking if key[len(prefix) :] not in held)
            if len(errors) == before:
                self._residual = False
                self.reset_adapter()
