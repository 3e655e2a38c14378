"""Checks of the arguments of a grouped call: every error names the argument and the shapes."""

from __future__ import annotations

import torch

from lorafast.engine import checks
from lorafast.engine.grouped.groups import Groups, of_expert
from lorafast.engine.problem import CallOptions, LayerTensors

# The dims of each tensor of a call: the first is that of the experts. A factor may be without it.
_DIMS = {
    "weight": (3,), "bias": (2,), "lora_A": (2, 3), "lora_B": (2, 3), "core": (2, 3),
    "magnitude": (2,), "norm": (2,), "out_scale": (2,), "lora_bias": (2,),
}  # fmt: skip
_FORMS = {
    "weight": "[E, N, K]", "bias": "[E, N]", "lora_A": "[E, R, K] or [R, K]",
    "lora_B": "[E, N, R] or [N, R]", "core": "[E, R, R] or [E, R]", "magnitude": "[E, N]",
    "norm": "[E, N]", "out_scale": "[E, N]", "lora_bias": "[E, N]",
}  # fmt: skip


def call(
    x: torch.Tensor, groups: Groups, tensors: LayerTensors, options: CallOptions
) -> torch.dtype:
    """Check everything that lorafast.grouped_linear is given; return the dtype it computes in."""
    if options.axis == "in":
        raise ValueError("axis='in' is not offered for experts; use axis='out'")
    if not isinstance(x, torch.Tensor) or x.dim() != 2:
        shape = tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
        raise ValueError(f"x {shape} must be [S, K], its rows sorted by expert")
    experts = _experts(tensors.weight)
    for name, dims in _DIMS.items():
        _has_experts(name, getattr(tensors, name), dims, experts, tensors.weight)
    _groups(groups, experts, x)
    # Of one expert all else is as in a single layer.
    return checks.call(x, of_expert(tensors, 0), options)


def _experts(weight: torch.Tensor) -> int:
    checks.floating("weight", weight)
    if weight.dim() != 3 or not weight.shape[0]:
        raise ValueError(f"weight {tuple(weight.shape)} must be [E>0, N, K]")
    return weight.shape[0]


def _has_experts(
    name: str,
    tensor: torch.Tensor | None,
    dims: tuple[int, ...],
    experts: int,
    weight: torch.Tensor,
) -> None:
    if tensor is None:
        return
    checks.floating(name, tensor)
    shared = tensor.dim() == 2 and len(dims) == 2 and name != "core"
    if tensor.dim() not in dims or (not shared and tensor.shape[0] != experts):
        raise ValueError(
            f"{name} {tuple(tensor.shape)} must be {_FORMS[name]} for weight {tuple(weight.shape)}"
        )


def _groups(groups: Groups, experts: int, x: torch.Tensor) -> None:
    offsets, rows = groups
    S = x.shape[0]
    for name, given, dtype, length in (
        ("offsets", offsets, torch.int32, experts + 1), ("rows", rows, torch.int64, S),
    ):  # fmt: skip
        if name == "rows" and given is None:
            continue
        if not isinstance(given, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, not {type(given).__name__}")
        if given.dtype != dtype or tuple(given.shape) != (length,):
            raise ValueError(
                f"{name} {tuple(given.shape)} {given.dtype} must be ({length},) {dtype} for "
                f"x {tuple(x.shape)} and {experts} experts"
            )
        if given.device != x.device:
            raise ValueError(
                f"{name} {tuple(given.shape)} is on {given.device}, "
                f"x {tuple(x.shape)} on {x.device}"
            )
