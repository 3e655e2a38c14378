"""lorafast.Linear: torch.nn.Linear with an adapter, its base frozen."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.utils.weak import WeakIdKeyDictionary

from lorafast import checks, fold, functional, norm
from lorafast.methods.adapter import Adapter, Part
from lorafast.methods.lora import LoRA
from lorafast.problem import Settings, Tensors, split_scaling

# The weights some layer's start took a delta out of: a second layer that shares one would take out its own on top.
_residual_weights: WeakIdKeyDictionary = WeakIdKeyDictionary()

# Every adapter tensor a layer can hold; those its adapter has no part for are None.
NAMES = ("lora_A", "lora_B", "lora_core", "lora_magnitude", "lora_out_scale", "lora_bias")


class _Folded(NamedTuple):
    """Factors as they were when they went into the weight, or came out of it, and the settings they did so with."""

    factors: Tensors
    settings: Settings


class _Merged(NamedTuple):
    """What unmerge needs: the bias if merge changed it, and the weight itself on the CPU (keep=True) or what was folded in."""

    bias: torch.Tensor | None
    weight: torch.Tensor | None
    folded: _Folded | None


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
        """The linear's own weight and bias Parameters, frozen, with an adapter. An init that changes W says so: W is shared.

        A subclass with a forward of its own, or a parametrized weight, is refused: neither would survive.
        """
        if why := why_not_plain(linear):
            raise TypeError(f"linear must be a plain torch.nn.Linear without an adapter; this one {why}")
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
        if dtype not in checks.DTYPES:
            raise TypeError(f"adapter_dtype {dtype!r} must be one of {', '.join(map(str, checks.DTYPES))}")
        if unknown := sorted(self._names_of(adapter) - set(NAMES)):
            raise TypeError(f"{adapter}.parts(): {', '.join(unknown)} not among {', '.join(NAMES)}")
        self.adapter, self.scaling = adapter, adapter.scaling
        self._merged: _Merged | None = None
        # Whether the weight lacks the delta the adapter started with, and that delta, if this layer saw the start.
        self._residual, self._start = False, None
        # The columns of lora_B that no longer train, their values, and whether freezing them took lora_B's gradient away.
        self.frozen_columns, self._froze_B = 0, False
        self.register_buffer("frozen_B", None, persistent=False)
        for name in NAMES:
            part = self._parts().get(name)
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
        gain_norm = None if self.lora_magnitude is None else self._norm()
        return functional.linear(
            x, self.weight, self.bias, self.lora_A, self.lora_B, self.lora_core, self.lora_magnitude, gain_norm, a.axis,
            self.lora_out_scale, self.lora_bias, self.scaling, a.dropout, a.dropout_on, a.keep, self.frozen_columns,
            training=self.training,
        )  # fmt: skip

    def _norm(self) -> torch.Tensor:
        exact = not self.adapter.detach_norm and torch.is_grad_enabled()
        cache = not exact and (self.adapter.cache_norm or not (self.training or torch.is_grad_enabled()))
        return functional.row_norm(
            self.weight, self.lora_A, self.lora_B, self.lora_core, self.lora_out_scale, self.scaling,
            self.adapter.axis, detach=not exact, cache=cache,
        )  # fmt: skip

    @torch.no_grad()
    def reset_adapter(self) -> None:
        """Start the adapter anew from the base weight: magnitude and SVD inits are derived again.

        An init that took its delta out of the weight first gets it back, to within a rounding of W, whatever training has made of
        the adapter. A layer that got its residual weight from a state dict does not know that delta, and says so.
        """
        self._refuse_if_merged("reset_adapter()")
        if self.weight.is_meta:
            return
        if parametrized := sorted(name for name in self._names_of(self.adapter) if name not in self._parameters):
            raise RuntimeError(f"{', '.join(parametrized)} of this layer is parametrized, and cannot be started anew through that")
        self._refuse_if_sharded("reset_adapter()")
        if self.adapter.residual and not self._residual and self.weight in _residual_weights:
            raise ValueError(
                f"weight {tuple(self.weight.shape)} already holds the residual of another layer that shares it; "
                "an init that leaves the weight alone (init='zero' or 'repo') can share"
            )
        base = self._base_weight()
        # Nothing of the layer has changed yet: an SVD may still fail.
        values = self.adapter.start(base)
        if values.keys() != self._names_of(self.adapter):
            raise TypeError(f"{self.adapter}.start() gives {sorted(values)}, parts() names {sorted(self._names_of(self.adapter))}")
        for name, value in values.items():
            held = getattr(self, name)
            if held.is_meta:
                fresh = torch.empty(held.shape, dtype=held.dtype, device=self.weight.device)
                held = nn.Parameter(fresh, requires_grad=held.requires_grad)
                setattr(self, name, held)
            held.copy_(value)
        self.freeze_columns(0)
        if self.adapter.residual:
            t, c = self._tensors(), self._settings()
            self._start = _folded(t._replace(bias=None, lora_bias=None), c, torch.device("cpu"))
            base = fold.subtract(t._replace(weight=base), c)
        if self._residual or self.adapter.residual:
            self.weight.copy_(base)
        self._hold_residual(self.adapter.residual)

    def _base_weight(self) -> torch.Tensor:
        """The weight as it was before any start took a delta out of it."""
        if not self._residual:
            return self.weight.detach()
        if self._start is None:
            raise RuntimeError(
                f"weight {tuple(self.weight.shape)} is the residual of a start this layer did not see: load the base weights first"
            )
        factors, settings = self._start
        return fold.add(_on(self.weight, factors), settings)

    @torch.no_grad()
    def restore_base(self) -> None:
        """Give the weight back what a residual start took out of it, to within a rounding."""
        if self._residual:
            self.weight.copy_(self._base_weight())
            self._hold_residual(False)

    @torch.no_grad()
    def merge(self, keep: bool = False) -> None:
        """Fold the adapter into the weight, in place. keep=True copies W to the CPU, and unmerge() is then bitwise.

        keep=False unmerges to within ½ulp(W')/|gain| + ½ulp(W) (twice that for a gain in float64, which has nothing wider to
        compute in), and refuses a gain of 0. A W' that overflows is refused. Merging twice is merging once.
        """
        if self._merged is not None:
            return
        if self.weight.is_meta:
            raise RuntimeError(f"weight {tuple(self.weight.shape)} is on the meta device: load it before merge()")
        if self.lora_bias is not None and self.bias is None:
            raise ValueError(f"lora_bias {tuple(self.lora_bias.shape)} cannot be merged into a layer without a bias")
        t, c = self._tensors(), self._settings()
        if t.magnitude is not None:
            self._refuse_if_sharded("merge()")
            t = t._replace(norm=functional.row_norm(t.weight, t.lora_A, t.lora_B, t.core, t.out_scale, self.scaling, c.axis))
        if not keep and not fold.invertible(t):
            raise ValueError(
                f"magnitude {tuple(t.magnitude.shape)} makes a gain no unmerge() can undo (0, inf or nan): merge(keep=True)"
            )
        merged = fold.fold(t, c)
        merged_bias = None if t.lora_bias is None else fold.fold_bias(t, c)
        for name, old, new in (("weight", t.weight, merged), ("bias", t.bias, merged_bias)):
            if new is not None and (old.isfinite() & ~new.isfinite()).any():
                raise ValueError(f"{name} {tuple(old.shape)} with its adapter folded in is not finite in {old.dtype}")
        weight = self.weight.detach().to("cpu", copy=True) if keep else None
        bias = None if t.lora_bias is None else t.bias.detach().clone()
        self._merged = _Merged(bias, weight, None if keep else _folded(t._replace(bias=None, lora_bias=None), c))
        if merged_bias is not None:
            self.bias.copy_(merged_bias)
        self.weight.copy_(merged)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take out what merge() folded in, whatever has happened to the factors since. Without a merge() nothing happens."""
        if self._merged is None:
            return
        bias, weight, folded = self._merged
        self.weight.copy_(fold.unfold(_on(self.weight, folded.factors), folded.settings) if weight is None else weight)
        if bias is not None:
            self.bias.copy_(bias)
        self._merged = None

    @torch.no_grad()
    def freeze_columns(self, count: int) -> None:
        """From now on the first `count` columns of lora_B are frozen at their values: no gradient, and no work for one.

        An optimizer may still move them by momentum or weight decay; restore_columns() after its step undoes that. Once all are
        frozen, lora_B.requires_grad is False and there is nothing to restore; but in a process group lora_B keeps its (zero)
        gradient, because a DDP reducer that was built with it waits for it.
        """
        if not isinstance(count, int) or not 0 <= count <= self.r:
            raise ValueError(f"count={count!r} must be between 0 and r={self.r} for lora_B {tuple(self.lora_B.shape)}")
        whole = count == self.r and not (dist.is_available() and dist.is_initialized())
        if whole and self.lora_B.requires_grad:
            self.lora_B.requires_grad_(False)
            self.lora_B.grad = None
            self._froze_B = True
        elif not whole and self._froze_B:
            self.lora_B.requires_grad_(True)
            self._froze_B = False
        self.frozen_columns = count
        self.frozen_B = self.lora_B[:, :count].detach().clone() if count and not whole else None

    @torch.no_grad()
    def restore_columns(self) -> None:
        """Write the frozen columns of lora_B back, bit for bit."""
        if self.frozen_B is not None:
            self.lora_B[:, : self.frozen_columns].copy_(self.frozen_B)

    def reset_parameters(self) -> None:
        """A fresh weight and bias as torch's, and the adapter started from them: also after to_empty()."""
        # nn.Linear's constructor calls this before there is an adapter.
        attached = "adapter" in self.__dict__
        if attached:
            self._refuse_if_merged("reset_parameters()")
        super().reset_parameters()
        if attached:
            self._hold_residual(False)
            self.reset_adapter()

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

    def _refuse_if_sharded(self, what: str) -> None:
        # A DTensor, asked for without importing torch.distributed.tensor for everybody.
        if hasattr(self.weight, "full_tensor"):
            raise NotImplementedError(f"weight {tuple(self.weight.shape)} is a sharded DTensor: {what} before sharding it")

    def _hold_residual(self, residual: bool) -> None:
        if residual:
            _residual_weights[self.weight] = True
        elif self._residual:  # only the layer that marked a shared weight may clear it
            _residual_weights.pop(self.weight, None)
        self._residual = residual

    def _names_of(self, adapter: Adapter) -> set[str]:
        return set(adapter.parts(self.out_features, self.in_features))

    def _refuse_if_merged(self, what: str) -> None:
        if self._merged is not None:
            raise RuntimeError(f"the layer is merged: unmerge() before {what}")

    def _parts(self) -> dict[str, Part]:
        return self.adapter.parts(self.out_features, self.in_features)

    def _tensors(self) -> Tensors:
        return Tensors(
            self.weight, self.bias, self.lora_A, self.lora_B, self.lora_core, self.lora_magnitude, None,
            self.lora_out_scale, self.lora_bias, None, split_scaling(self.scaling)[1],
        )  # fmt: skip

    def _settings(self) -> Settings:
        """The settings of a forward pass outside training."""
        return Settings(split_scaling(self.scaling)[0], axis=self.adapter.axis)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if self._merged is not None:
            raise RuntimeError(
                f"{prefix}weight is merged: together with the adapter beside it, it would apply the delta twice; unmerge() first"
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        # A parametrized factor is no parameter of this module any more, and loads by its own name.
        held = [name for name in NAMES if self._parameters.get(name) is not None]
        given = [name for name in held if prefix + name in state_dict]
        arguments, before = (state_dict, prefix, metadata, strict), len(errors)
        if self._merged is not None:
            errors.append(f"{prefix}weight: the layer is merged; unmerge() before loading")
        elif given and len(given) < len(held):
            absent = ", ".join(prefix + name for name in held if name not in given)
            errors.append(f"part of an adapter: {absent} missing for {self.adapter}; give all of it, or none to start anew")
        elif given or prefix + "weight" not in state_dict:
            super()._load_from_state_dict(*arguments, missing, unexpected, errors)
            if given:
                if prefix + "weight" in state_dict and len(errors) == before:
                    self._hold_residual(self.adapter.residual)
                    self._start = None
                if self.frozen_B is not None:
                    self.freeze_columns(self.frozen_columns)
        else:
            lacking: list[str] = []
            super()._load_from_state_dict(*arguments, lacking, unexpected, errors)
            missing.extend(key for key in lacking if key[len(prefix) :] not in held)
            if len(errors) == before:
                self._start_from_loaded_weight(assigned=metadata.get("assign_to_params_buffers", False))

    def _start_from_loaded_weight(self, assigned: bool) -> None:
        self._hold_residual(False)
        if assigned and self.adapter.residual:
            # The weight is the caller's own tensor, and the start is going to change it.
            self.weight = nn.Parameter(self.weight.detach().clone(), requires_grad=self.weight.requires_grad)
        self.reset_adapter()


def why_not_plain(linear: nn.Module) -> str | None:
    """Why a lorafast.Linear cannot take this module's place, or None."""
    kind = f"{type(linear).__module__}.{type(linear).__qualname__}"
    if not isinstance(linear, nn.Linear) or type(linear).forward is not nn.Linear.forward:
        return f"is a {kind}"
    if isinstance(linear, NonDynamicallyQuantizableLinear):
        return f"is a {kind}, whose weight nn.MultiheadAttention reads without calling it"
    return None if isinstance(linear.weight, nn.Parameter) else f"is a {kind} whose weight is no Parameter"


def _folded(t: Tensors, c: Settings, device: torch.device | None = None) -> _Folded:
    """Copies of the factors, on their device or another."""
    copies = (None if part is None else part.detach().to(device or part.device, copy=True) for part in t[1:])
    return _Folded(Tensors(None, *copies), c)


def _on(weight: torch.Tensor, factors: Tensors) -> Tensors:
    """The factors beside the weight, on its device."""
    return Tensors(weight.detach(), *(None if part is None else part.to(weight.device) for part in factors[1:]))
