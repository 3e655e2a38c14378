"""Warnings of lorafast.adapt: choices that it accepts and that are seldom meant."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from lorafast.methods.adapter import Adapter
from lorafast.models import expert_targets
from lorafast.models.module_names import format_names
from lorafast.nn.size_warnings import size_complaints

# Parts of the names of 3-D Parameters that are added to activations, not multiplied with them.
_ADDED = ("bias", "embed", "latent", "position", "token")
# torch's own modules with a 3-D weight, from which others may derive theirs.
_CONVOLUTIONS = (nn.Conv1d, nn.ConvTranspose1d)

Shape = tuple[int, int]


def warn_about_untargeted(model: nn.Module, targets: Iterable[list[str]]) -> None:
    """Warn that "all-linear" leaves 3-D weights out, such as those of fused experts.

    targets: the names of what is adapted.
    """
    names = [
        f"{name}.{key}"
        for name, module in model.named_modules()
        if not type(module).__module__.startswith("torch.nn.")
        and not isinstance(module, _CONVOLUTIONS)
        for key, parameter in module.named_parameters(recurse=False)
        if _is_stack_of_matrices(key, parameter)
    ]
    names = expert_targets.untargeted(names, targets)
    if names:
        warnings.warn(
            "target_modules='all-linear' adapts nn.Linear and Conv1D (target_parameters takes "
            "experts' weights), and no 3-D weight, as fused experts have them: "
            f"{format_names(names)}",
            stacklevel=3,
        )


def warn_about_uncalled(names: list[str]) -> None:
    """Warn that "all-linear" leaves these linears out, because nothing calls them."""
    if names:
        warnings.warn(
            "target_modules='all-linear' leaves out linears whose weight the model reads without "
            f"calling them, where an adapter would have no effect: {format_names(names)}",
            stacklevel=3,
        )


def _is_stack_of_matrices(name: str, parameter: torch.Tensor) -> bool:
    """True for weights [experts, N, K]; False for class tokens and position embeddings."""
    return (
        parameter.dim() == 3
        and min(parameter.shape) > 1
        and not any(part in name.lower() for part in _ADDED)
    )


def warn_about_sizes(layers: Mapping[str, tuple[Adapter, Shape]]) -> None:
    """Warn about adapters whose scaling is 0, and about ranks above the sizes of their weight.

    layers: the adapter of each layer and the shape (N, K) of its weight, by the layer's name.
    """
    flat = ((name, adapter, N, K) for name, (adapter, (N, K)) in layers.items())
    for complaint, names in size_complaints(flat):
        warnings.warn(f"{complaint} {format_names(names)}", stacklevel=5)
