"""Folding an adapter into its layer's weight, and taking it out again."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from lorafast import functional
from lorafast.engine.problem import CallOptions, LayerTensors
from lorafast.nn import merge_math


class Folded(NamedTuple):
    """Factors as they were when they went into the weight, or came out of it, and the settings they did so with."""

    factors: LayerTensors
    settings: CallOptions


class Merged(NamedTuple):
    """What unmerge needs: the bias if merge changed it, and the weight itself on the CPU (keep=True) or what was folded in."""

    bias: torch.Tensor | None
    weight: torch.Tensor | None
    folded: Folded | None


class Merging(nn.Module):
    """merge and unmerge of an adapted layer, by its _W, _tensors and _settings."""

    _merged: Merged | None

    @property
    def merged(self) -> bool:
        """Whether the weight holds the adapter."""
        return self._merged is not None

    @torch.no_grad()
    def merge(self, keep: bool = False) -> None:
        """Fold the adapter into the weight, in place. keep=True copies W to the CPU, and unmerge() is then bitwise.

        keep=False unmerges to within ½ulp(W')/|gain| + ½ulp(W), with a gain in float64, which has nothing wider to compute in,
        ulp(W + delta) more; and refuses a gain of 0. A W' that overflows is refused. Merging twice is merging once.
        """
        if self._merged is not None:
            return
        t, c, weight, bias = self.folded_in(keep)
        kept = self.weight.detach().to("cpu", copy=True) if keep else None
        old_bias = None if bias is None else t.bias.detach().clone()
        merged = Merged(
            old_bias, kept, None if keep else folded(t._replace(bias=None, lora_bias=None), c)
        )
        self._W().copy_(weight)
        if bias is not None:
            self.bias.copy_(bias)
        self._merged = merged

    @torch.no_grad()
    def folded_in(
        self, keep: bool = False
    ) -> tuple[LayerTensors, CallOptions, torch.Tensor, torch.Tensor | None]:
        """What merge(keep) would fold in and how, W' [N,K], and the bias if it changes. Raises as merge() does; changes nothing."""
        if self.disabled:
            raise RuntimeError("the adapter is disabled: merge outside disable_adapter()")
        if self.weight.is_meta:
            raise RuntimeError(
                f"weight {tuple(self.weight.shape)} is on the meta device: load it before merge()"
            )
        if self.lora_bias is not None and self.bias is None:
            raise ValueError(
                f"lora_bias {tuple(self.lora_bias.shape)} cannot be merged into a layer without a bias"
            )
        self._refuse_if_sharded("merge()")
        t, c = self._tensors(), self._settings()
        t = t._replace(weight=t.weight.detach())
        if t.magnitude is not None:
            t = t._replace(
                norm=functional.row_norm(
                    t.weight, t.lora_A, t.lora_B, t.core, t.out_scale, self.scaling, c.axis
                )
            )
        if not keep and not merge_math.invertible(t):
            raise ValueError(
                f"magnitude {tuple(t.magnitude.shape)} makes a gain no unmerge() can undo (0, inf or nan): merge(keep=True)"
            )
        weight = merge_math.fold(t, c)
        bias = None if t.lora_bias is None else merge_math.fold_bias(t, c)
        for name, old, new in (("weight", t.weight, weight), ("bias", t.bias, bias)):
            if new is not None and (old.isfinite() & ~new.isfinite()).any():
                raise ValueError(
                    f"{name} {tuple(old.shape)} with its adapter folded in is not finite in {old.dtype}"
                )
        return t, c, weight, bias

    def invertible(self) -> bool:
        """Whether merge(keep=False) could be undone: no gain is 0 or not finite."""
        t = self._tensors()
        return t.magnitude is None or merge_math.invertible(t._replace(norm=self._norm().detach()))

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take out what merge() folded in, whatever has happened to the factors since. Without a merge() nothing happens."""
        if self._merged is None:
            return
        bias, weight, what = self._merged
        if weight is None:
            self._W().copy_(merge_math.unfold(on(self._W(), what.factors), what.settings))
        else:
            self.weight.copy_(weight)
        if bias is not None:
            self.bias.copy_(bias)
        self._merged = None

    def _refuse_if_merged(self, what: str) -> None:
        if self._merged is not None:
            raise RuntimeError(f"the layer is merged: unmerge() before {what}")


def folded(t: LayerTensors, c: CallOptions, device: torch.device | None = None) -> Folded:
    """Copies of the factors, on their device or another."""
    copies = (
        None if part is None else part.detach().to(device or part.device, copy=True)
        for part in t[1:]
    )
    return Folded(LayerTensors(None, *copies), c)


def on(weight: torch.Tensor, factors: LayerTensors) -> LayerTensors:
    """The factors beside the weight, on its device."""
    return LayerTensors(
        weight.detach(), *(None if part is None else part.to(weight.device) for part in factors[1:])
    )
