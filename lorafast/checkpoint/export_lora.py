"""Any method as plain LoRA: factors of each weight's change ΔW, for engines that serve LoRA."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import nn

from lorafast.checkpoint import file_format, keys
from lorafast.checkpoint.tensor_values import TensorValues
from lorafast.engine import checks, formula
from lorafast.engine.precision import accumulator
from lorafast.methods import svd
from lorafast.methods.lora import LoRA
from lorafast.models.module_names import unwrap
from lorafast.nn import merge_math
from lorafast.nn.adapter_layer import AdapterLayer
from lorafast.nn.expert_parameter import ParameterExperts
from lorafast.nn.experts import Experts


class LoRAExport(NamedTuple):
    """A model's adapters as plain LoRA.

    tensors and config: the content of the adapter file. errors: ‖ΔW - BA‖ / ‖ΔW‖ (Frobenius norm)
    of each layer.
    """

    tensors: dict[str, torch.Tensor]
    config: dict[str, Any]
    errors: dict[str, float]

    def __str__(self) -> str:
        worst = max(self.errors, key=self.errors.get)
        mean = math.sqrt(sum(error**2 for error in self.errors.values()) / len(self.errors))
        ranks = f"rank {self.config['r']}" + (" and others" if self.config["rank_pattern"] else "")
        return (
            f"{len(self.errors)} layers as plain LoRA of {ranks}: truncation error ‖ΔW - BA‖/‖ΔW‖ "
            f"at most {self.errors[worst]:.2e} ({worst}), root mean square {mean:.2e}"
        )


@torch.no_grad()
def as_lora(model: nn.Module, layers: dict[str, AdapterLayer], rank: int | None) -> LoRAExport:
    """Return a model's adapters as LoRA with s = 1, in fp32 (fp64 for fp64 factors).

    Args:
        model: the model of the layers.
        layers: its adapted layers by name.
        rank: truncate to this rank; None keeps the exact rank, which DoRA's change does not have.

    Raises:
        ValueError: rank is None and the method is DoRA, or rank is no positive integer.
    """
    if rank is not None:
        checks.whole("rank", rank)
    tensors, errors, adapters = {}, {}, {}
    for name, layer in layers.items():
        if isinstance(layer, Experts) and not isinstance(layer, ParameterExperts):
            raise ValueError(
                f"{name}: as_lora=True writes what PEFT reads, and PEFT has no lorafast.Experts"
            )
        layer._refuse_if_merged("save_adapter(as_lora=True)")
        layer._refuse_if_sharded("save_adapter(as_lora=True)")
        A, B, errors[name] = _factors(name, layer, rank)
        has_bias = layer.lora_bias is not None
        adapters[name] = LoRA(r=A.shape[-2], alpha=A.shape[-2], lora_bias=has_bias)
        values = {"lora_A": A, "lora_B": B}
        if has_bias:
            values["lora_bias"] = _output_bias(layer)
        tensors |= keys.layer_tensors(name, layer, values, plain=True)
    tensors |= keys.extra_tensors(model, TensorValues(model))
    config = file_format.build_config(unwrap(model), layers, adapters)
    return LoRAExport(tensors, config, errors)


def _factors(
    name: str, layer: AdapterLayer, rank: int | None
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return A [r,K], B [N,r] and the relative error of one layer's change ΔW ≈ BA.

    ΔW is the change of the weight as it was before any init changed it. Those of experts are [E,…].
    """
    if layer.lora_magnitude is None:
        A, B = _low_rank_factors(layer)
        if rank is None or rank >= A.shape[-2]:
            return A, B, 0.0
        if A.dim() == 3:
            norms = [float(torch.linalg.matrix_norm(b @ a)) for a, b in zip(A, B, strict=True)]
            return _stack([truncate(*own, rank) for own in zip(A, B, strict=True)], norms)
        return truncate(A, B, rank)
    if rank is None:
        raise ValueError(
            f"{name}: the change {layer.adapter} makes has no low rank: save_adapter(..., "
            "as_lora=True, rank=...)"
        )
    tensors = layer._tensors()
    weight = tensors.weight.detach().to(accumulator(tensors.weight.dtype))
    tensors = tensors._replace(weight=weight, norm=layer._norm().detach())
    delta = merge_math.merged_weight(tensors, layer._options()) - layer._base_weight().to(weight)
    if delta.dim() == 3:
        norms = [float(torch.linalg.matrix_norm(own)) for own in delta]
        return _stack([_truncated_change(own, rank) for own in delta], norms)
    return _truncated_change(delta, rank)


def _truncated_change(delta: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return the best factors of a change [N,K] of this rank, and their relative error."""
    U, S, Vh = svd.truncated_svd(delta, min(rank, *delta.shape))
    total = torch.linalg.matrix_norm(delta)
    error = torch.linalg.matrix_norm(delta - U * S @ Vh)
    return Vh, U * S, float(error / total) if total else 0.0


def _stack(
    experts: list[tuple[torch.Tensor, torch.Tensor, float]], norms: list[float]
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return the factors of all experts, and their relative error. norms: of their changes."""
    A, B, errors = zip(*experts, strict=True)
    total = math.hypot(*norms)
    error = math.hypot(*(one * norm for one, norm in zip(errors, norms, strict=True)))
    return torch.stack(A), torch.stack(B), error / total if total else 0.0


def truncate(
    A: torch.Tensor, B: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return the best factors of BA of a smaller rank, and their relative error.

    With B = QR and Aᵀ = PT the singular values of BA are those of the small matrix R Tᵀ.
    """
    Q, R = torch.linalg.qr(B)
    P, T = torch.linalg.qr(A.t())
    U, S, Vh = torch.linalg.svd(R @ T.t())
    total = float(torch.linalg.vector_norm(S))
    error = float(torch.linalg.vector_norm(S[rank:]))
    return Vh[:rank] @ P.t(), Q @ U[:, :rank] * S[:rank], error / total if total else 0.0


def _low_rank_factors(layer: AdapterLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and B of a low-rank change, with scaling, core and out_scale in B.

    The factors that a residual init took out of the weight are appended with their sign reversed.
    """
    tensors = layer._tensors()
    dtype = accumulator(tensors.lora_A.dtype)
    A = tensors.lora_A.to(dtype)
    B = formula.effective_B(tensors, dtype) * float(layer.scaling)
    start = layer.start_factors()
    if start is None:
        return A, B
    initial, options = start
    scaling = options.scaling if initial.scale is None else float(initial.scale)
    initial_B = formula.effective_B(initial, dtype) * scaling
    return torch.cat([A, initial.lora_A.to(A)], -2), torch.cat([B, -initial_B.to(B)], -1)


def _output_bias(layer: AdapterLayer) -> torch.Tensor:
    """Return what the layer's lora_bias adds to its output."""
    bias = layer.lora_bias.to(accumulator(layer.lora_bias.dtype)) * float(layer.scaling)
    if layer.lora_magnitude is None or layer.adapter.axis == "in":
        return bias
    return bias * formula.gain_of(layer.lora_magnitude, layer._norm()).to(bias)
