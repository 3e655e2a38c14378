"""A frozen base layer with an adapter's tensors beside it: their start, values and states."""

from __future__ import annotations

import copy
from typing import Any, Self

import torch
from torch import nn

from lorafast import functional
from lorafast.engine import checks, weight_norm
from lorafast.engine.problem import CallOptions, LayerTensors, split_scaling
from lorafast.methods.adapter import Adapter, TensorSpec
from lorafast.methods.lamda import LaMDA
from lorafast.methods.lora import LoRA
from lorafast.nn import merge_math
from lorafast.nn.adapter_state import NAMES, AdapterState
from lorafast.nn.merge_mixin import DeltaFactors, copy_factors, with_weight

# Attributes of layers pickled by version 0.1 before the packages had their present names.
_OLD_ATTRIBUTES = {"_away": "_removed_delta"}


class AdapterLayer(AdapterState):
    """A base module with an adapter.

    A subclass also derives from the base's class, and its _W gives the weight as a matrix [N,K].
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_core: nn.Parameter | None
    lora_magnitude: nn.Parameter | None
    lora_out_scale: nn.Parameter | None
    _base: tuple[nn.Module]
    # The adapter tensors that a schedule has frozen: enabling the adapter leaves them frozen.
    frozen_parts: frozenset[str] = frozenset()

    @classmethod
    def _from(
        cls,
        base: nn.Module,
        adapter: Adapter | None,
        adapter_dtype: torch.dtype | None,
        start: bool = True,
    ) -> Self:
        """Return a layer on the base's own Parameters, frozen. plain() gives the base back.

        start=False leaves the adapter's values to take(), which must follow.
        """
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.training = base.training
        layer._adopt(base)
        # A copy without Parameters, so that none outlives its replacement; in a tuple, because an
        # attribute that is a Module would be a child.
        shell = copy.copy(base)
        shell._parameters = dict.fromkeys(base._parameters)
        layer._base = (shell,)
        layer._attach(adapter, adapter_dtype, start)
        return layer

    def _adopt(self, base: Any) -> None:
        """Take over the base's sizes and Parameters."""
        raise NotImplementedError

    def _new_base(self) -> nn.Module:
        """Return a base module, where the layer was made without one."""
        raise NotImplementedError

    def _attach(
        self, adapter: Adapter | None, adapter_dtype: torch.dtype | None, start: bool = True
    ) -> None:
        adapter = LoRA() if adapter is None else adapter
        if not isinstance(adapter, Adapter):
            raise TypeError(
                f"adapter must be a lorafast adapter such as lorafast.LoRA(r=8), not {adapter!r}"
            )
        # A quantised weight is dequantised for it.
        weight = self._W()
        self._check_base(weight, adapter)
        adapter = adapter.bind_layer("", weight) if start else adapter
        dtype = factor_dtype(weight.dtype, adapter_dtype)
        if dtype not in checks.DTYPES:
            allowed = ", ".join(map(str, checks.DTYPES))
            raise TypeError(f"adapter_dtype {dtype!r} must be one of {allowed}")
        self.adapter, self.scaling = adapter, adapter.scaling
        if unknown := sorted(self._tensor_specs().keys() - set(NAMES)):
            raise TypeError(
                f"{adapter}.tensor_specs(): {', '.join(unknown)} not among {', '.join(NAMES)}"
            )
        self._merged = None
        # True if the weight lacks the delta the adapter started with; and the factors of that
        # delta, if this layer made it.
        self._residual = False
        self._start = None
        self.disabled = False
        self._removed_delta: DeltaFactors | None = None
        self._register_columns()
        self._has_values = False
        self._register_adapter(dtype)
        if start:
            self.reset_adapter()
        # Last, so that an adapter that refuses its weight leaves the caller's module as it was.
        for base in (self.weight, self.bias):
            if base is not None:
                base.requires_grad_(False)
        self._expect_schedule()

    def _check_base(self, weight: torch.Tensor, adapter: Adapter) -> None:
        """Raise ValueError if the weight's form is not that of the layer or of the adapter."""
        checks.pair("weight", weight, "[N, K]")

    def _register_adapter(self, dtype: torch.dtype) -> None:
        """Register a Parameter, still without values, for every adapter tensor."""
        specs = self._tensor_specs()
        for name in NAMES:
            parameter = None
            if name in specs:
                empty = torch.empty(specs[name].shape, device=self.weight.device, dtype=dtype)
                parameter = nn.Parameter(empty, requires_grad=specs[name].trained)
            self.register_parameter(name, parameter)

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
        """Return the norm of a call now, by the policy of the adapter."""
        adapter = self.adapter
        policy = weight_norm.policy_of(adapter.detach_norm, adapter.cache_norm)
        return self._norm_of(self._tensors(), policy)

    def _norm_of(
        self, tensors: LayerTensors, policy: weight_norm.NormPolicy | None = None
    ) -> torch.Tensor:
        """Return the norm of these tensors; None: detached and not cached."""
        policy = policy or weight_norm.NormPolicy()
        weight, _, A, B, core, *_ = tensors
        return functional.row_norm(
            weight, A, B, core, tensors.out_scale, self.scaling, self.adapter.axis, *policy
        )

    @torch.no_grad()
    def reset_adapter(self) -> None:
        """Start the adapter anew from the base weight: magnitude and SVD inits are derived again.

        An init that took its delta out of the weight first gives it back, to within a rounding of
        W, whatever training has made of the adapter. On the meta device nothing happens.

        Raises:
            RuntimeError: the layer is merged, a factor is parametrized, or the layer got its
                residual weight from a state dict and does not know the delta.
            ValueError: the weight already holds the residual of another layer.
            NotImplementedError: the weight is sharded.
        """
        self._refuse_if_merged("reset_adapter()")
        if self.weight.is_meta:
            return
        specs = self._tensor_specs()
        self.refuse_computed_factors("cannot be started anew through that")
        if self.awaits_start():
            # A weight that came after the meta device is whole: a start took nothing out of it.
            self._set_residual(False)
        self._refuse_residual_of_another()
        base = self._base_weight()
        # Nothing of the layer has changed yet: an SVD may still fail.
        values = self._initial_values(base)
        if values.keys() != specs.keys():
            raise TypeError(
                f"{self.adapter}.init_tensors() gives {sorted(values)}, "
                f"tensor_specs() names {sorted(specs)}"
            )
        self._write_values(values, base, residual=self.adapter.residual)
        self.freeze_columns(0)

    @torch.no_grad()
    def take(
        self, values: dict[str, torch.Tensor], start: dict[str, torch.Tensor] | None = None
    ) -> None:
        """Take over an adapter's trained values, by Parameter name, all of them.

        start: the values that a residual start began with, whose delta is taken out of the weight
        again; without it a residual start is computed anew.
        """
        self._refuse_if_merged("take()")
        self.refuse_computed_factors("cannot take values through that")
        if self.adapter.residual and start is None:
            self.reset_adapter()
        elif self.adapter.residual and not self._has_start(start):
            self._refuse_residual_of_another()
            self._write_values(self._delta_part(start), self._base_weight(), residual=True)
        columns = self.frozen_columns
        self._write_values(values, None, residual=self.adapter.residual)
        self.freeze_columns(columns)

    def refuse_computed_factors(self, why: str) -> None:
        """Raise RuntimeError if a factor is parametrized: what is written into it is lost."""
        specs = self._tensor_specs()
        if parametrized := sorted(name for name in specs if name not in self._parameters):
            raise RuntimeError(
                f"{', '.join(parametrized)} of this layer is parametrized, and {why}"
            )

    def _write_values(
        self, values: dict[str, torch.Tensor], base: torch.Tensor | None, residual: bool
    ) -> None:
        """Write values into the Parameters.

        With base [N,K] the weight becomes it, less the delta of the values if residual.
        """
        for name, value in values.items():
            parameter = getattr(self, name)
            if parameter.is_meta:
                fresh = torch.empty_like(parameter, device=self.weight.device)
                parameter = nn.Parameter(fresh, requires_grad=parameter.requires_grad)
                setattr(self, name, parameter)
            parameter.copy_(value)
        self._has_values = True
        if base is None:
            return
        if residual:
            tensors, options = self._tensors(), self._options()
            factors = tensors._replace(bias=None, lora_bias=None)
            self._start = copy_factors(factors, options, torch.device("cpu"))
            base = merge_math.subtract_delta(tensors._replace(weight=base), options)
        if self._residual or residual:
            self._W().copy_(base)
        self._set_residual(residual)

    def _initial_values(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.adapter.init_tensors(weight)

    def awaits_start(self) -> bool:
        """Return True if the weight has left the meta device and the adapter has not."""
        return not self.weight.is_meta and self.lora_A.is_meta

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        if self.awaits_start():
            self.reset_adapter()
        super()._apply(fn, recurse)
        if self.lora_A.is_meta:
            self._has_values = False
        return self

    def disable(self) -> None:
        """Run as the base layer until enable().

        The delta that a residual start took out of the weight is added to the product.
        """
        self._refuse_if_merged("disable()")
        start = self.start_factors()
        self._removed_delta = None
        if start is not None:
            factors = with_weight(self._W(), start.factors)._replace(weight=None)
            self._removed_delta = start._replace(factors=factors)
        self.disabled = True

    def enable(self) -> None:
        """Run with the adapter again."""
        self.disabled, self._removed_delta = False, None

    def plain(self) -> nn.Module:
        """Return a module like the one this layer was made of, on its present weight and bias."""
        module = copy.copy(self._base[0]) if "_base" in self.__dict__ else self._new_base()
        module._parameters = {name: getattr(self, name) for name in module._parameters}
        return module.train(self.training)

    def unfreeze(self) -> None:
        """Let train again what a schedule froze: columns of lora_B, and whole factors."""
        super().unfreeze()
        for name in self.frozen_parts:
            getattr(self, name).requires_grad_(True)
        self.frozen_parts = frozenset()

    def _factor_B(self) -> nn.Parameter:
        return self.lora_B

    def _needs_schedule(self) -> bool:
        return isinstance(self.adapter, LaMDA)

    def reset_parameters(self) -> None:
        """Set a fresh weight and bias as torch does, and start the adapter from them.

        Also after to_empty().
        """
        # torch's constructors call this before there is an adapter.
        attached = "adapter" in self.__dict__
        if attached:
            self._refuse_if_merged("reset_parameters()")
            # Refuses here what could not start afterwards.
            self.adapter.bind_layer("", self._W())
        super().reset_parameters()  # type: ignore[misc]  # of the base's class
        if attached:
            self._set_residual(False)
            self.reset_adapter()

    def train(self, mode: bool = True) -> Self:
        """Set training mode as torch does; a norm that cache_norm=True kept is dropped."""
        weight_norm.forget(self._parameters.get("lora_B"))
        return super().train(mode)

    def extra_repr(self) -> str:
        """Return the line of repr(): the base's, the adapter, and whether it is merged."""
        merged = ", merged" if self.merged else ""
        return f"{super().extra_repr()}, adapter={self.adapter}{merged}"

    def __setstate__(self, state: dict) -> None:
        super().__setstate__({_OLD_ATTRIBUTES.get(name, name): v for name, v in state.items()})

    def _tensor_specs(self) -> dict[str, TensorSpec]:
        return self.adapter.tensor_specs(*self._W().shape)

    def _tensors(self, weight: torch.Tensor | None = None) -> LayerTensors:
        """Return the tensors of a call now, with another weight if one is given."""
        scale = split_scaling(self.scaling)[1]
        weight = self._W() if weight is None else weight
        return LayerTensors(
            weight, self.bias, self.lora_A, self.lora_B, self.lora_core, self.lora_magnitude,
            None, self.lora_out_scale, self.lora_bias, None, scale,
        )  # fmt: skip

    def _options(self) -> CallOptions:
        """Return the options of a call outside training."""
        return CallOptions(split_scaling(self.scaling)[0], axis=self.adapter.axis)


def factor_dtype(weight: torch.dtype, adapter_dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype of a layer's factors.

    The one that is given, else fp32 beside a half-precision weight, else the weight's.
    """
    half = weight in (torch.bfloat16, torch.float16)
    return adapter_dtype or (torch.float32 if half else weight)
