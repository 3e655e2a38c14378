"""Inits that take their delta out of the weight, so that the layer's output does not change."""

from __future__ import annotations

import torch
from torch.utils.weak import WeakIdKeyDictionary

from lorafast.engine.precision import narrowest_dtype
from lorafast.methods.adapter import Adapter
from lorafast.nn import merge_math
from lorafast.nn.merge_mixin import DeltaFactors, MergeMixin, with_weight

# The weights out of which some layer's start took a delta: a second layer that shares one would
# take out its own as well.
_residual_weights: WeakIdKeyDictionary = WeakIdKeyDictionary()

# The adapter tensors that make the delta; a magnitude or a bias does not.
_DELTA_NAMES = ("lora_A", "lora_B", "lora_core", "lora_out_scale")


class ResidualStart(MergeMixin):
    """What a layer knows of the delta that its adapter's init took out of the weight."""

    adapter: Adapter
    _residual: bool
    _start: DeltaFactors | None

    def _delta_part(self, start: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return those of a start's values that make its delta."""
        return {name: value for name, value in start.items() if name in _DELTA_NAMES}

    def _has_start(self, start: dict[str, torch.Tensor]) -> bool:
        """Return True if this start is the layer's own: its weight then stays as it is."""
        if not self._residual or self._start is None:
            return False
        factors, options = self._start
        if factors.scale is not None or self._tensors().scale is not None:
            return False
        if options.scaling != self._options().scaling:
            return False
        own = (factors.lora_A, factors.lora_B, factors.core, factors.out_scale)
        return all(
            _is_rounded(start[name], part)
            for name, part in zip(_DELTA_NAMES, own, strict=True)
            if part is not None
        )

    def _refuse_residual_of_another(self) -> None:
        self._refuse_if_sharded("starting an adapter")
        if self.adapter.residual or self._residual:
            self.refuse_computed_weight("starting an adapter that changes the weight")
        if self.adapter.residual and not self._residual and self.weight in _residual_weights:
            raise ValueError(
                f"weight {tuple(self.weight.shape)} already holds the residual of another layer "
                "that shares it; an init that leaves the weight alone (init='zero' or 'repo') "
                "can share"
            )

    def _base_weight(self) -> torch.Tensor:
        """Return the weight [N,K] as it was before a start took a delta out of it."""
        start = self.start_factors()
        if start is None:
            return self._W().detach()
        return merge_math.add_delta(with_weight(self._W(), start.factors), start.options)

    def start_factors(self) -> DeltaFactors | None:
        """Return the factors of the delta that a start took out of the weight, on the CPU.

        None if nothing was taken out. RuntimeError if the layer does not know them.
        """
        if self._residual and self._start is None:
            raise RuntimeError(
                f"weight {tuple(self.weight.shape)} is the residual of a start this layer did not "
                "see: load the base weights first"
            )
        return self._start if self._residual else None

    @torch.no_grad()
    def restore_base(self) -> None:
        """Add to the weight what a residual start took out of it, to within a rounding."""
        if self._residual:
            self._W().copy_(self._base_weight())
            self._set_residual(False)

    def _refuse_if_sharded(self, action: str) -> None:
        # A DTensor, recognised without importing torch.distributed.tensor.
        if hasattr(self.weight, "full_tensor"):
            shape = tuple(self.weight.shape)
            raise NotImplementedError(
                f"weight {shape} is a sharded DTensor: {action} before sharding it"
            )

    def _set_residual(self, residual: bool) -> None:
        """Record whether the weight lacks the adapter's first delta."""
        if residual:
            _residual_weights[self.weight] = True
        elif self._residual:  # only the layer that marked a shared weight may clear it
            _residual_weights.pop(self.weight, None)
        self._residual = residual


def _is_rounded(value: torch.Tensor, kept: torch.Tensor) -> bool:
    """True if the value is what was kept, or what a cast such as layer.bfloat16() made of it."""
    return torch.equal(value.to(kept), kept.to(narrowest_dtype(value)).to(kept))
