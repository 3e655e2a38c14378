"""What every adapted layer is: a frozen base with an adapter's tensors beside it, their start, their states and their ways out."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from lorafast import functional
from lorafast.engine import checks, weight_norm
from lorafast.engine.problem import CallOptions, LayerTensors, split_scaling
from lorafast.methods.adapter import Adapter, TensorSpec
from lorafast.methods.lora import LoRA
from lorafast.nn import merge_math
from lorafast.nn.merge_mixin import Folded, Merged, Merging, folded, on

# The weights some layer's start took a delta out of: a second layer that shares one would take out its own on top.
_residual_weights: WeakIdKeyDictionary = WeakIdKeyDictionary()

# Every adapter tensor a layer can hold; those its adapter has no part for are None.
NAMES = ("lora_A", "lora_B", "lora_core", "lora_magnitude", "lora_out_scale", "lora_bias")


class AdapterLayer(Merging):
    """A base module with an adapter. A subclass is of the base's class, and says in _W how its weight is a matrix [N,K]."""

    # The parts that a schedule has frozen whole: what lets an adapter train again leaves them to it.
    frozen_parts: frozenset[str] = frozenset()

    @classmethod
    def _from(
        cls,
        base: nn.Module,
        adapter: Adapter | None,
        adapter_dtype: torch.dtype | None,
        start: bool = True,
    ) -> AdapterLayer:
        """A layer on the base's own Parameters, frozen; base itself is kept for plain(). start=False leaves the adapter's values
        to take(), which must follow.
        """
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.training = base.training
        layer._adopt(base)
        # A shell without Parameters, so that none outlives its replacement; in a tuple, for a Module by name would be a child.
        shell = copy.copy(base)
        shell._parameters = dict.fromkeys(base._parameters)
        layer._base = (shell,)
        layer._attach(adapter, adapter_dtype, start)
        return layer

    def _adopt(self, base: nn.Module) -> None:
        """Take over the base's sizes and Parameters."""
        raise NotImplementedError

    def _W(self) -> torch.Tensor:
        """The weight as [N,K]: itself, or a view of it."""
        raise NotImplementedError

    def _attach(
        self, adapter: Adapter | None, adapter_dtype: torch.dtype | None, start: bool = True
    ) -> None:
        adapter = LoRA() if adapter is None else adapter
        if not isinstance(adapter, Adapter):
            raise TypeError(
                f"adapter must be a lorafast adapter such as lorafast.LoRA(r=8), not {adapter!r}"
            )
        checks.pair("weight", self.weight, "[N, K]")
        adapter = adapter.bind_layer("", self._W()) if start else adapter
        dtype = factor_dtype(self.weight, adapter_dtype)
        if dtype not in checks.DTYPES:
            raise TypeError(
                f"adapter_dtype {dtype!r} must be one of {', '.join(map(str, checks.DTYPES))}"
            )
        self.adapter, self.scaling = adapter, adapter.scaling
        if unknown := sorted(self._parts().keys() - set(NAMES)):
            raise TypeError(
                f"{adapter}.tensor_specs(): {', '.join(unknown)} not among {', '.join(NAMES)}"
            )
        self._merged: Merged | None = None
        # Whether the weight lacks the delta the adapter started with, and that delta, if this layer saw the start.
        self._residual, self._start = False, None
        self.disabled, self._away = False, None
        # The columns of lora_B that no longer train, their values, and whether freezing them took lora_B's gradient away.
        self.frozen_columns, self._froze_B = 0, False
        self.register_buffer("frozen_B", None, persistent=False)
        for name in NAMES:
            part = self._parts().get(name)
            empty = (
                None
                if part is None
                else torch.empty(part.shape, device=self.weight.device, dtype=dtype)
            )
            self.register_parameter(
                name, None if part is None else nn.Parameter(empty, requires_grad=part.trained)
            )
        if start:
            self.reset_adapter()
        # Last, so that an adapter that refuses its weight leaves the caller's module as it was.
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

    def _norm(self) -> torch.Tensor:
        t, (exact, cache) = self._tensors(), self._norm_kind()
        return functional.row_norm(
            t.weight,
            t.lora_A,
            t.lora_B,
            t.core,
            t.out_scale,
            self.scaling,
            self.adapter.axis,
            detach=not exact,
            cache=cache,
        )

    def _norm_kind(self) -> tuple[bool, bool]:
        """Whether the norm has its exact gradient in this call, and whether it may come from the cache."""
        adapter, grad = self.adapter, torch.is_grad_enabled()
        exact = grad and not adapter.detach_norm
        return exact, not exact and (adapter.cache_norm or not (self.training or grad))

    @torch.no_grad()
    def reset_adapter(self) -> None:
        """Start the adapter anew from the base weight: magnitude and SVD inits are derived again.

        An init that took its delta out of the weight first gets it back, to within a rounding of W, whatever training has made of
        the adapter. A layer that got its residual weight from a state dict does not know that delta, and says so.
        """
        self._refuse_if_merged("reset_adapter()")
        if self.weight.is_meta:
            return
        if parametrized := sorted(name for name in self._parts() if name not in self._parameters):
            raise RuntimeError(
                f"{', '.join(parametrized)} of this layer is parametrized, and cannot be started anew through that"
            )
        self._refuse_residual_of_another()
        base = self._base_weight()
        # Nothing of the layer has changed yet: an SVD may still fail.
        values = self._started(base)
        if values.keys() != self._parts().keys():
            raise TypeError(
                f"{self.adapter}.init_tensors() gives {sorted(values)}, tensor_specs() names {sorted(self._parts())}"
            )
        self._take_values(values, base, residual=self.adapter.residual)
        self.freeze_columns(0)

    @torch.no_grad()
    def take(
        self, values: dict[str, torch.Tensor], start: dict[str, torch.Tensor] | None = None
    ) -> None:
        """Take an adapter's trained values, by Parameter name, all of them and of the right shapes.

        start: what a residual start began with, taken out of the weight again; without it a residual start is computed anew.
        """
        self._refuse_if_merged("take()")
        if self.adapter.residual and start is None:
            self.reset_adapter()
        elif self.adapter.residual and not self._started_alike(start):
            self._refuse_residual_of_another()
            self._take_values(self._started_as(start), self._base_weight(), residual=True)
        columns = self.frozen_columns
        self._take_values(values, None, residual=self.adapter.residual)
        self.freeze_columns(columns)

    def _take_values(
        self, values: dict[str, torch.Tensor], base: torch.Tensor | None, residual: bool
    ) -> None:
        """Put values into the Parameters. With base [N,K], the weight becomes it, less the delta the values make if residual."""
        for name, value in values.items():
            held = getattr(self, name)
            if held.is_meta:
                fresh = torch.empty(held.shape, dtype=held.dtype, device=self.weight.device)
                held = nn.Parameter(fresh, requires_grad=held.requires_grad)
                setattr(self, name, held)
            held.copy_(value)
        weight_norm.forget(self.lora_B)
        if base is None:
            return
        if residual:
            t, c = self._tensors(), self._settings()
            self._start = folded(t._replace(bias=None, lora_bias=None), c, torch.device("cpu"))
            base = merge_math.subtract(t._replace(weight=base), c)
        if self._residual or residual:
            self._W().copy_(base)
        self._hold_residual(residual)

    def _started(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.adapter.init_tensors(weight)

    def _started_as(self, start: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Only what makes the delta a start took out; a magnitude or bias does not."""
        return {
            name: value
            for name, value in start.items()
            if name in ("lora_A", "lora_B", "lora_core", "lora_out_scale")
        }

    def _started_alike(self, start: dict[str, torch.Tensor]) -> bool:
        """Whether this start is the layer's own, so that its weight can stay as it is, to the bit."""
        if not self._residual or self._start is None:
            return False
        f, c = self._start
        if (c.scaling, f.scale is None) != (
            self._settings().scaling,
            True,
        ) or self._tensors().scale is not None:
            return False
        own = {
            "lora_A": f.lora_A,
            "lora_B": f.lora_B,
            "lora_core": f.core,
            "lora_out_scale": f.out_scale,
        }
        return all(
            torch.equal(start[name].to(part), part)
            for name, part in own.items()
            if part is not None
        )

    def _refuse_residual_of_another(self) -> None:
        self._refuse_if_sharded("starting an adapter")
        if self.adapter.residual and not self._residual and self.weight in _residual_weights:
            raise ValueError(
                f"weight {tuple(self.weight.shape)} already holds the residual of another layer that shares it; "
                "an init that leaves the weight alone (init='zero' or 'repo') can share"
            )

    def _base_weight(self) -> torch.Tensor:
        """The weight as it was before any start took a delta out of it, [N,K]."""
        if not self._residual:
            return self._W().detach()
        factors, settings = self.start_factors()
        return merge_math.add(on(self._W(), factors), settings)

    def start_factors(self) -> Folded | None:
        """What a residual start took out of the weight, on the CPU; None if nothing was taken out."""
        if self._residual and self._start is None:
            raise RuntimeError(
                f"weight {tuple(self.weight.shape)} is the residual of a start this layer did not see: load the base weights first"
            )
        return self._start if self._residual else None

    @torch.no_grad()
    def restore_base(self) -> None:
        """Give the weight back what a residual start took out of it, to within a rounding."""
        if self._residual:
            self._W().copy_(self._base_weight())
            self._hold_residual(False)

    def disable(self) -> None:
        """Run as the base layer until enable(). What a residual start took out of the weight is added to the product."""
        self._refuse_if_merged("disable()")
        start = self.start_factors()
        self._away = (
            None
            if start is None
            else start._replace(factors=on(self._W(), start.factors)._replace(weight=None))
        )
        self.disabled = True

    def enable(self) -> None:
        """Run with the adapter again."""
        self.disabled, self._away = False, None

    def plain(self) -> nn.Module:
        """A module as the one this layer was made of, on the layer's weight and bias as they now are."""
        module = copy.copy(self._base[0]) if "_base" in self.__dict__ else self._new_base()
        module._parameters = {name: getattr(self, name) for name in module._parameters}
        return module.train(self.training)

    def _new_base(self) -> nn.Module:
        raise NotImplementedError

    @torch.no_grad()
    def freeze_columns(self, count: int) -> None:
        """From now on the first `count` columns of lora_B are frozen at their values: no gradient, and no work for one.

        An optimizer may still move them by momentum or weight decay; restore_columns() after its step undoes that. Once all are
        frozen, lora_B.requires_grad is False and there is nothing to restore; but in a process group lora_B keeps its (zero)
        gradient, because a DDP reducer that was built with it waits for it.
        """
        if not isinstance(count, int) or not 0 <= count <= self.r:
            raise ValueError(
                f"count={count!r} must be between 0 and r={self.r} for lora_B {tuple(self.lora_B.shape)}"
            )
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
        # torch's constructors call this before there is an adapter.
        attached = "adapter" in self.__dict__
        if attached:
            self._refuse_if_merged("reset_parameters()")
            self.adapter.bind_layer("", self._W())  # refuses here what could not start afterwards
        super().reset_parameters()
        if attached:
            self._hold_residual(False)
            self.reset_adapter()

    def train(self, mode: bool = True) -> AdapterLayer:
        """As torch's; a cached norm is forgotten."""
        weight_norm.forget(self._parameters.get("lora_B"))
        return super().train(mode)

    def extra_repr(self) -> str:
        merged = ", merged" if self.merged else ""
        return f"{super().extra_repr()}, adapter={self.adapter}{merged}"

    def _apply(self, fn, recurse: bool = True):
        weight_norm.forget(self._parameters.get("lora_B"))
        return super()._apply(fn, recurse)

    def _refuse_if_sharded(self, what: str) -> None:
        # A DTensor, asked for without importing torch.distributed.tensor for everybody.
        if hasattr(self.weight, "full_tensor"):
            raise NotImplementedError(
                f"weight {tuple(self.weight.shape)} is a sharded DTensor: {what} before sharding it"
            )

    def _hold_residual(self, residual: bool) -> None:
        if residual:
            _residual_weights[self.weight] = True
        elif self._residual:  # only the layer that marked a shared weight may clear it
            _residual_weights.pop(self.weight, None)
        self._residual = residual

    def _parts(self) -> dict[str, TensorSpec]:
        return self.adapter.tensor_specs(*self._W().shape)

    def _tensors(self) -> LayerTensors:
        # A tenth of the price of nn.Module's attributes, at every call. Instead of an entry there may be a property (parametrized)
        # or a view (flattened); and somebody else's dict may gather an entry when it is asked for.
        held = self._parameters
        try:
            bias, A, B, core = held["bias"], held["lora_A"], held["lora_B"], held["lora_core"]
            magnitude, out_scale, lora_bias = (
                held["lora_magnitude"],
                held["lora_out_scale"],
                held["lora_bias"],
            )
        except KeyError:
            bias, A, B, core = self.bias, self.lora_A, self.lora_B, self.lora_core
            magnitude, out_scale, lora_bias = (
                self.lora_magnitude,
                self.lora_out_scale,
                self.lora_bias,
            )
        scale = split_scaling(self.scaling)[1]
        return LayerTensors(
            self._W(), bias, A, B, core, magnitude, None, out_scale, lora_bias, None, scale
        )

    def _settings(self) -> CallOptions:
        """The settings of a forward pass outside training."""
        return CallOptions(split_scaling(self.scaling)[0], axis=self.adapter.axis)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if self._merged is not None:
            raise RuntimeError(
                f"{prefix}weight is merged: together with the adapter beside it, it would apply the delta twice; unmerge() first"
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._residual and (metadata := getattr(destination, "_metadata", None)) is not None:
            metadata.setdefault(prefix[:-1], {})["residual"] = True

    def _load_from_state_dict(
        self, state_dict, prefix, metadata, strict, missing, unexpected, errors
    ):
        # A parametrized factor is no parameter of this module any more, and loads by its own name.
        held = [name for name in NAMES if self._parameters.get(name) is not None]
        given = [name for name in held if prefix + name in state_dict]
        arguments, before = (state_dict, prefix, metadata, strict), len(errors)
        if self._merged is not None:
            errors.append(f"{prefix}weight: the layer is merged; unmerge() before loading")
        elif given and len(given) < len(held):
            absent = ", ".join(prefix + name for name in held if name not in given)
            errors.append(
                f"part of an adapter: {absent} missing for {self.adapter}; give all of it, or none to start anew"
            )
        elif given or prefix + "weight" not in state_dict:
            old = self.weight.detach().clone() if given and self._start is not None else None
            super()._load_from_state_dict(*arguments, missing, unexpected, errors)
            if given:
                if prefix + "weight" in state_dict and len(errors) == before:
                    # The same residual, as when a run goes on from the same base, is that of the same start.
                    if old is None or not self._residual or not torch.equal(old, self.weight):
                        self._start = None
                    self._hold_residual(self.adapter.residual)
                if self.frozen_B is not None:
                    self.freeze_columns(self.frozen_columns)
        elif metadata.get("residual"):
            errors.append(
                f"{prefix}weight is what a start left of a weight: load it together with its adapter's keys"
            )
        elif why := self._why_no_start():
            errors.append(
                f"{prefix}weight without adapter keys would start the adapter anew: {why}"
            )
        else:
            lacking: list[str] = []
            super()._load_from_state_dict(*arguments, lacking, unexpected, errors)
            missing.extend(key for key in lacking if key[len(prefix) :] not in held)
            if len(errors) == before:
                self._start_from_loaded_weight(
                    assigned=metadata.get("assign_to_params_buffers", False)
                )

    def _why_no_start(self) -> str | None:
        try:
            self.adapter.bind_layer("", self._W())
        except ValueError as error:
            return str(error)
        return None

    def _start_from_loaded_weight(self, assigned: bool) -> None:
        self._hold_residual(False)
        if assigned and self.adapter.residual:
            # The weight is the caller's own tensor, and the start is going to change it.
            self.weight = nn.Parameter(
                self.weight.detach().clone(), requires_grad=self.weight.requires_grad
            )
        self.reset_adapter()


def factor_dtype(weight: torch.Tensor, adapter_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of a layer's factors: the one asked for, else fp32 on a half-precision weight, else the weight's."""
    half = weight.dtype in (torch.bfloat16, torch.float16)
    return adapter_dtype or (torch.float32 if half else weight.dtype)
