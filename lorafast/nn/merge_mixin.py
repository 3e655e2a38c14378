"""merge and unmerge of an adapter layer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from lorafast.engine.precision import accumulator
from lorafast.engine.problem import CallOptions, LayerTensors, Scaling
from lorafast.nn import merge_math


class DeltaFactors(NamedTuple):
    """The factors of a delta as they were when it was added to a weight or taken out of one."""

    factors: LayerTensors
    options: CallOptions


class MergeState(NamedTuple):
    """What unmerge needs: the bias if merge changed it, and either the weight or the delta.

    weight is a copy (keep=True); delta the factors of what was added (keep=False).
    """

    bias: torch.Tensor | None
    weight: torch.Tensor | None
    delta: DeltaFactors | None


class MergeResult(NamedTuple):
    """What a merge would write, and what it was computed from."""

    tensors: LayerTensors
    options: CallOptions
    weight: torch.Tensor
    bias: torch.Tensor | None


class MergeMixin(nn.Module):
    """merge and unmerge for a layer with _W, _tensors and _options."""

    weight: torch.Tensor
    bias: nn.Parameter | None
    lora_bias: nn.Parameter | None
    scaling: Scaling
    disabled: bool
    _merged: MergeState | None

    def _W(self) -> torch.Tensor:
        """Return the weight as [N,K]: itself, or a view of it."""
        raise NotImplementedError

    def _tensors(self, weight: torch.Tensor | None = None) -> LayerTensors:
        """Return the tensors of a call now, with another weight if one is given."""
        raise NotImplementedError

    def _options(self) -> CallOptions:
        """Return the options of a call outside training."""
        raise NotImplementedError

    def _norm(self) -> torch.Tensor:
        """Return the norm of a call now."""
        raise NotImplementedError

    def _norm_of(self, tensors: LayerTensors) -> torch.Tensor:
        """Return the norm of these tensors."""
        raise NotImplementedError

    def _refuse_if_sharded(self, action: str) -> None:
        """Raise NotImplementedError if the weight is sharded."""
        raise NotImplementedError

    @property
    def merged(self) -> bool:
        """True if the weight contains the adapter's delta."""
        return self._merged is not None

    @torch.no_grad()
    def merge(self, keep: bool = False, keep_on: torch.device | str | None = "cpu") -> None:
        """Add the adapter to the weight, in place: W' = gain⊙(W + sBA). Twice is once.

        Args:
            keep: True copies W, and unmerge() is then bitwise. False unmerges to within
                ½ulp(W')/|gain| + ½ulp(W), for a gain in float64 and an fp64 weight ulp(W + delta)
                more, and refuses a gain of 0.
            keep_on: the device of that copy; None is the weight's own.

        Raises:
            RuntimeError: the adapter is disabled, the weight is on the meta device, or the weight
                or bias is computed from other tensors (a parametrization, pruning, weight norm).
            NotImplementedError: the weight is sharded.
            ValueError: W' would not be finite, could not be unmerged, or a lora_bias has no bias
                to be added to. Nothing has changed then.

        Example:
            layer = lorafast.Linear(8, 8, adapter=lorafast.LoRA(r=2))
            layer.merge()
            layer.unmerge()
        """
        if self._merged is not None:
            return
        tensors, options, weight, bias = self.merge_result(keep)
        kept = None
        if keep:
            kept = self.weight.detach().to(keep_on or self.weight.device, copy=True)
        old_bias = None if bias is None else tensors.bias.detach().clone()
        delta = None
        if not keep:
            delta = copy_factors(tensors._replace(bias=None, lora_bias=None), options)
        if keep:
            # Before the weight changes, so that unmerge() undoes a merge that was interrupted.
            self._merged = MergeState(old_bias, kept, None)
        self._W().copy_(weight)
        if bias is not None:
            self.bias.copy_(bias)
        self._merged = MergeState(old_bias, kept, delta)

    @torch.no_grad()
    def merge_result(self, keep: bool = False) -> MergeResult:
        """Return what merge(keep) would write, W' [N,K] among it. Raises as merge does."""
        self.refuse_merge()
        return self._merged_parts(self._tensors(), keep)

    def refuse_merge(self) -> None:
        """Raise what merge() raises of the layer's state, whatever the values are."""
        if self.disabled:
            raise RuntimeError("the adapter is disabled: merge outside disable_adapter()")
        self.refuse_computed_weight("merge()")
        if self.weight.is_meta:
            shape = tuple(self.weight.shape)
            raise RuntimeError(f"weight {shape} is on the meta device: load it before merge()")
        self._refuse_if_sharded("merge()")

    def _merged_parts(self, tensors: LayerTensors, keep: bool) -> MergeResult:
        """Return the merged weight and bias of these tensors. ValueError as merge_result."""
        options = self._options()
        if self.lora_bias is not None and self.bias is None:
            shape = tuple(self.lora_bias.shape)
            raise ValueError(f"lora_bias {shape} cannot be merged into a layer without a bias")
        tensors = tensors._replace(weight=tensors.weight.detach())
        if tensors.magnitude is not None:
            tensors = tensors._replace(norm=self._norm_of(tensors))
        if not keep and not merge_math.is_invertible(tensors):
            raise ValueError(
                f"magnitude {tuple(tensors.magnitude.shape)} makes a gain no unmerge() can undo "
                "(0, inf or nan): merge(keep=True)"
            )
        weight = merge_math.merged_weight(tensors, options)
        bias = None if tensors.lora_bias is None else merge_math.merged_bias(tensors, options)
        refuse_overflow("weight", tensors.weight, weight)
        refuse_overflow("bias", tensors.bias, bias)
        return MergeResult(tensors, options, weight, bias)

    def is_invertible(self) -> bool:
        """Return True if merge(keep=False) could be undone: no gain is 0 or not finite."""
        tensors = self._tensors()
        if tensors.magnitude is None:
            return True
        return merge_math.is_invertible(tensors._replace(norm=self._norm().detach()))

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take out of the weight what merge() added, whatever has happened to the factors since.

        Without a merge() nothing happens.

        Example:
            layer = lorafast.Linear(8, 8, adapter=lorafast.LoRA(r=2))
            layer.merge(keep=True)
            layer.unmerge()
        """
        if self._merged is None:
            return
        self.refuse_computed_weight("unmerge()")
        bias, weight, delta = self._merged
        if weight is None:
            tensors = with_weight(self._W(), delta.factors)
            self._W().copy_(merge_math.unmerged_weight(tensors, delta.options))
        else:
            self.weight.copy_(weight)
        if bias is not None:
            self.bias.copy_(bias)
        self._merged = None

    def refuse_computed_weight(self, action: str) -> None:
        """Raise RuntimeError if weight or bias is computed anew in every call.

        What is written into it is lost then.
        """
        for name in ("weight", "bias"):
            tensor = getattr(self, name, None)
            if tensor is not None and name not in self._parameters:
                raise RuntimeError(
                    f"{name} {tuple(tensor.shape)} is computed from other tensors (a "
                    "parametrization, pruning, weight or spectral norm), and what is written into "
                    f"it would be lost: remove that before {action}"
                )

    def _refuse_if_merged(self, action: str) -> None:
        if self._merged is not None:
            raise RuntimeError(f"the layer is merged: unmerge() before {action}")


def copy_factors(
    tensors: LayerTensors, options: CallOptions, device: torch.device | None = None
) -> DeltaFactors:
    """Return copies of the factors, on their device or another."""
    copies = (
        None if part is None else part.detach().to(device or part.device, copy=True)
        for part in tensors[1:]
    )
    return DeltaFactors(LayerTensors(None, *copies), options)


def with_weight(weight: torch.Tensor, factors: LayerTensors) -> LayerTensors:
    """Return the factors beside the weight, on its device."""
    moved = (None if part is None else part.to(weight.device) for part in factors[1:])
    return LayerTensors(weight.detach(), *moved)


def refuse_overflow(name: str, old: torch.Tensor | None, new: torch.Tensor | None) -> None:
    """Raise ValueError if merging made a finite element of a tensor infinite or NaN."""
    # A sum with a part that is not finite is not finite, and takes a tenth of the time of a look at
    # every element.
    if new is None or new.sum(dtype=accumulator(new.dtype)).isfinite():
        return
    if (old.isfinite() & ~new.isfinite().to(old.device)).any():
        raise ValueError(
            f"{name} {tuple(old.shape)} with its adapter folded in is not finite in {old.dtype}"
        )
