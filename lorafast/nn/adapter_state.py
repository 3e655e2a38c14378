"""State dicts of an adapter layer: whole adapters, plain base weights, and nothing between."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lorafast.nn.frozen_columns import FrozenColumns
from lorafast.nn.residual_start import ResidualStart

# Every adapter tensor a layer can have; those that its adapter does not use are None.
NAMES = ("lora_A", "lora_B", "lora_core", "lora_magnitude", "lora_out_scale", "lora_bias")


class AdapterState(FrozenColumns, ResidualStart):
    """Saving and loading of an adapter layer by torch's state dicts.

    A state dict with weight and bias but no adapter keys starts the adapter anew; one with some of
    the adapter's keys is an error.
    """

    def reset_adapter(self) -> None:
        """Start the adapter anew from the base weight."""
        raise NotImplementedError

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
        has_weight = prefix + "weight" in state_dict
        arguments, before = (state_dict, prefix, metadata, strict), len(errors)
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
            lacking: list[str] = []
            super()._load_from_state_dict(*arguments, lacking, unexpected, errors)
            missing.extend(key for key in lacking if key[len(prefix) :] not in names)
            if len(errors) == before:
                assigned = metadata.get("assign_to_params_buffers", False)
                self._start_from_loaded_weight(assigned)

    def _load_adapter(self, arguments, missing, unexpected, errors, given, has_weight) -> None:
        """Load a whole adapter, or nothing of this layer."""
        before = len(errors)
        old = self.weight.detach().clone() if given and self._start is not None else None
        load: Any = super()._load_from_state_dict
        load(*arguments, missing, unexpected, errors)
        if not given:
            return
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

    def _start_from_loaded_weight(self, assigned: bool) -> None:
        self._set_residual(False)
        if assigned and self.adapter.residual:
            # The weight is the caller's own tensor, and the start is going to change it.
            copied = self.weight.detach().clone()
            self.weight = nn.Parameter(copied, requires_grad=self.weight.requires_grad)
        self.reset_adapter()
