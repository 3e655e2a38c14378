"""State dicts of an adapter layer: whole adapters, plain base weights, and nothing between."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from lorafast.engine.precision import narrowest_dtype
from lorafast.nn import merge_math
from lorafast.nn.frozen_columns import FrozenColumns
from lorafast.nn.merge_mixin import with_weight
from lorafast.nn.residual_start import ResidualStart
from lorafast.runtime.torch_internals import running_load

# Every adapter tensor a layer can have; those that its adapter does not use are None.
NAMES = ("lora_A", "lora_B", "lora_core", "lora_magnitude", "lora_out_scale", "lora_bias")


class AdapterState(FrozenColumns, ResidualStart):
    """Saving and loading of an adapter layer by torch's state dicts.

    A state dict with weight and bias but no adapter keys starts the adapter anew, but for a trained
    adapter under strict=False, which stays. One with some of the adapter's keys is an error.
    """

    # True once the adapter has values. False on the meta device, and after to_empty() from there.
    _has_values: bool = True

    def reset_adapter(self) -> None:
        """Start the adapter anew from the base weight."""
        raise NotImplementedError

    def _has_weight(self, state_dict: dict[str, Any], prefix: str) -> bool:
        """Return True if the state dict has the base weight, from which an adapter starts."""
        return f"{prefix}weight" in state_dict

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if self._merged is not None:
            raise RuntimeError(
                f"{prefix}weight is merged: together with the adapter beside it, it would apply "
                "the delta twice; unmerge() first"
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", None)
        if self._residual and metadata is not None:
            metadata.setdefault(prefix[:-1], {})["residual"] = True

    def _load_from_state_dict(
        self, state_dict, prefix, metadata, strict, missing, unexpected, errors
    ):
        # A parametrized factor is no parameter of this module any more, and loads by its own name.
        names = [name for name in NAMES if self._parameters.get(name) is not None]
        given = [name for name in names if prefix + name in state_dict]
        has_weight = self._has_weight(state_dict, prefix)
        arguments = (state_dict, prefix, metadata, strict)
        if self._merged is not None:
            errors.append(f"{prefix}weight: the layer is merged; unmerge() before loading")
        elif given and len(given) < len(names):
            absent = ", ".join(prefix + name for name in names if name not in given)
            errors.append(
                f"part of an adapter: {absent} missing for {self.adapter}; "
                "give all of it, or none to start anew"
            )
        elif given or not has_weight:
            self._load_adapter(arguments, missing, unexpected, errors, bool(given), has_weight)
        elif metadata.get("residual"):
            errors.append(
                f"{prefix}weight is what a start left of a weight: "
                "load it together with its adapter's keys"
            )
        elif why := self._why_no_start():
            errors.append(
                f"{prefix}weight without adapter keys would start the adapter anew: {why}"
            )
        else:
            self._load_base(arguments, missing, unexpected, errors, names)

    def _load_base(self, arguments, missing, unexpected, errors, names) -> None:
        """Load a base weight, and start the adapter from it.

        With strict=False a trained adapter stays, and its keys are missing.
        """
        prefix, metadata = arguments[1:3]
        trained = self._may_be_trained()
        strict, level = running_load()
        kept = trained and not strict
        if kept and self._residual and self._start is None:
            errors.append(
                f"{prefix}weight: what the adapter's start took out of the weight is not known; "
                "strict=True starts the adapter anew"
            )
            return
        lacking: list[str] = []
        before = len(errors)
        load: Any = super()._load_from_state_dict
        load(*arguments, lacking, unexpected, errors)
        missing.extend(key for key in lacking if kept or key[len(prefix) :] not in names)
        if len(errors) > before:
            return
        if metadata.get("assign_to_params_buffers", False) and self.adapter.residual:
            self._own_weight()
        if kept:
            self._take_start_out()
            return
        if trained:
            warnings.warn(
                "a state dict without adapter keys is loaded with strict=True: trained adapters "
                "start anew (strict=False keeps them)",
                stacklevel=level,
            )
        self._set_residual(False)
        self.reset_adapter()

    def _load_adapter(self, arguments, missing, unexpected, errors, given, has_weight) -> None:
        """Load a whole adapter, or nothing of this layer."""
        before = len(errors)
        # A weight that another module holds is loaded already.
        own = "weight" in self._parameters
        known = own and given and self._start is not None and not self.weight.is_meta
        old = self.weight.detach().clone() if known else None
        load: Any = super()._load_from_state_dict
        load(*arguments, missing, unexpected, errors)
        if not given:
            return
        self._has_values = self._has_values or len(errors) == before
        if has_weight and len(errors) == before:
            # An equal residual, as when a run goes on from the same base, has the same start.
            if old is None or not self._residual or not torch.equal(old, self.weight):
                self._start = None
            self._set_residual(self.adapter.residual)
        if self.frozen_B is not None:
            self.freeze_columns(self.frozen_columns)

    def _why_no_start(self) -> str | None:
        """Return why the adapter cannot start from a weight, or None."""
        try:
            self.adapter.bind_layer("", self._W())
        except ValueError as error:
            return str(error)
        return None

    def _may_be_trained(self) -> bool:
        """Return True if the adapter has values, and others than a start gives."""
        if not self._has_values or self.weight.is_meta or hasattr(self.weight, "full_tensor"):
            return False
        values = {name: self._parameters.get(name) for name in NAMES}
        if self._residual:
            return not self._has_start({k: v for k, v in values.items() if v is not None})
        bias, magnitude = values.pop("lora_bias"), values.pop("lora_magnitude")
        if all(value is None or value.any() for value in values.values()):
            return True
        if bias is not None and bias.any():
            return True
        return magnitude is not None and not _is_norm(magnitude.detach(), self._norm())

    def _own_weight(self) -> None:
        """Replace the weight by a copy: it is the caller's own tensor, and a start changes it."""
        copied = self.weight.detach().clone()
        self.weight = nn.Parameter(copied, requires_grad=self.weight.requires_grad)

    def _take_start_out(self) -> None:
        """Take what the adapter started with out of the base weight that has been loaded."""
        start = self.start_factors()
        if start is None:
            return
        tensors = with_weight(self._W(), start.factors)
        with torch.no_grad():
            self._W().copy_(merge_math.subtract_delta(tensors, start.options))
        self._set_residual(True)


def _is_norm(magnitude: torch.Tensor, norm: torch.Tensor) -> bool:
    """True if the magnitude is the norm to within the rounding of a cast of the layer.

    A cast rounds weight and magnitude, each by half a unit; 2⁻¹⁸ is for the order of the sum.
    """
    kind = torch.finfo(narrowest_dtype(magnitude))
    return torch.allclose(magnitude.to(norm), norm, rtol=kind.eps + 2**-18, atol=kind.tiny)
