"""Any method as plain LoRA: factors of the change it makes to each weight, for engines that serve nothing else."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import nn

from lorafast.checkpoint import file_format, keys
from lorafast.engine import checks, weight_norm
from lorafast.engine.problem import accumulator
from lorafast.methods import svd
from lorafast.methods.lora import LoRA
from lorafast.models.module_names import unwrapped
from lorafast.nn import merge_math
from lorafast.nn.adapter_layer import AdapterLayer


class Exported(NamedTuple):
    """tensors and config of a plain LoRA. errors: of each layer, ‖ΔW - BA‖ / ‖ΔW‖ (Frobenius)."""

    tensors: dict[str, torch.Tensor]
    config: dict[str, Any]
    errors: dict[str, float]

    def __str__(self) -> str:
        worst = max(self.errors, key=self.errors.get)
        mean = math.sqrt(sum(error**2 for error in self.errors.values()) / len(self.errors))
        ranks = f"rank {self.config['r']}" + (" and others" if self.config["rank_pattern"] else "")
        return (
            f"{len(self.errors)} layers as plain LoRA of {ranks}: truncation error ‖ΔW - BA‖/‖ΔW‖ at most "
            f"{self.errors[worst]:.2e} ({worst}), root mean square {mean:.2e}"
        )


@torch.no_grad()
def as_lora(model: nn.Module, layers: dict[str, AdapterLayer], rank: int | None) -> Exported:
    """A model's adapters as LoRA with s = 1, in fp32 (fp64 for fp64 factors), and what truncation loses. rank=None: exact, to a
    rounding; DoRA's change has no rank for that.
    """
    if rank is not None:
        checks.whole("rank", rank)
    tensors, errors, plain = {}, {}, {}
    for name, layer in layers.items():
        layer._refuse_if_merged("save_adapter(as_lora=True)")
        layer._refuse_if_sharded("save_adapter(as_lora=True)")
        A, B, errors[name] = _factors(name, layer, rank)
        plain[name] = LoRA(r=A.shape[0], alpha=A.shape[0], lora_bias=layer.lora_bias is not None)
        values = {"lora_A": A, "lora_B": B}
        if layer.lora_bias is not None:
            values["lora_bias"] = _bias(layer)
        tensors |= keys.of_layer(name, layer, values, plain=True)
    tensors |= {key: keys.whole(tensor) for key, tensor in keys.of_rest(model).items()}
    return Exported(tensors, file_format.config_of(unwrapped(model), layers, plain), errors)


def _factors(
    name: str, layer: AdapterLayer, rank: int | None
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """A [r,K], B [N,r] and the relative error of one layer's change ΔW ≈ BA, against the weight before any start changed it."""
    if layer.lora_magnitude is None:
        A, B = _low(layer)
        if rank is None or rank >= A.shape[0]:
            return A, B, 0.0
        Q, R = torch.linalg.qr(B)
        P, T = torch.linalg.qr(A.t())
        U, S, Vh = torch.linalg.svd(R @ T.t())
        return Vh[:rank] @ P.t(), Q @ U[:, :rank] * S[:rank], _share(S[rank:], S)
    if rank is None:
        raise ValueError(
            f"{name}: the change {layer.adapter} makes has no low rank: save_adapter(..., as_lora=True, rank=...)"
        )
    t, c = layer._tensors(), layer._settings()
    t = t._replace(
        weight=t.weight.detach().to(accumulator(t.weight.dtype)), norm=layer._norm().detach()
    )
    delta = merge_math.fold(t, c) - layer._base_weight().to(t.weight)
    rank = min(rank, *delta.shape)
    U, S, Vh = svd.top(delta, rank)
    total = torch.linalg.matrix_norm(delta)
    left = torch.linalg.matrix_norm(delta - U * S @ Vh)
    return Vh, U * S, float(left / total) if total else 0.0


def _low(layer: AdapterLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of a change that has a low rank, its scaling, core and out_scale in B; a start's share goes off again."""
    t = layer._tensors()
    wide = accumulator(t.lora_A.dtype)
    A, B = t.lora_A.to(wide), weight_norm.effective_B(t, wide) * float(layer.scaling)
    if (start := layer.start_factors()) is None:
        return A, B
    f = start.factors
    scaling = start.settings.scaling if f.scale is None else float(f.scale)
    B0 = weight_norm.effective_B(f, wide) * scaling
    return torch.cat([A, f.lora_A.to(A)]), torch.cat([B, -B0.to(B)], 1)


def _bias(layer: AdapterLayer) -> torch.Tensor:
    """What the layer's lora_bias adds to its output."""
    bias = layer.lora_bias.to(accumulator(layer.lora_bias.dtype)) * float(layer.scaling)
    if layer.lora_magnitude is None or layer.adapter.axis == "in":
        return bias
    return bias * weight_norm.gain(layer.lora_magnitude, layer._norm()).to(bias)


def _share(left: torch.Tensor, whole: torch.Tensor) -> float:
    total = float(torch.linalg.vector_norm(whole))
    return float(torch.linalg.vector_norm(left)) / total if total else 0.0
