"""AdaLoRA in PEFT's files: key names, E as a column, the rank pattern, the schedule's options."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from lorafast.methods.adalora import AdaLoRA
from lorafast.models import expressions

# PEFT's name of each adapter tensor, after the layer's name.
KEY_NAMES = {"lora_A": "lora_A", "lora_B": "lora_B", "lora_core": "lora_E"}
# Attribute of a model: the options of its schedule.AdaLoRA under PEFT's names.
SCHEDULE_ATTRIBUTE = "_lorafast_adalora"
# The options in a file if there was no schedule: PEFT's defaults, and the one step PEFT requires.
SCHEDULE_FIELDS = {
    "total_step": 1,
    "tinit": 0,
    "tfinal": 0,
    "deltaT": 1,
    "beta1": 0.85,
    "beta2": 0.85,
    "orth_reg_weight": 0.5,
}
# A key of PEFT's rank pattern. In a PEFT model that has not been saved yet, the adapter's name
# follows.
_PATTERN_KEY = re.compile(r"(.+)\.lora_E(\.[^.]+)?")


def to_file(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return an adapter tensor as a file has it: the core, [R] in a layer, is E [R,1]."""
    return tensor.unsqueeze(1) if name == "lora_core" else tensor


def file_shape(name: str, shape: tuple[int, ...], given_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape that a layer's tensor must have in a file.

    A layer holds at least one triplet, while PEFT may have pruned all of them: a rank of 0 in the
    file is accepted where the layer's is 1.

    Args:
        name: name of the adapter tensor.
        shape: its shape in the layer.
        given_shape: its shape in the file.
    """
    expected = list((*shape, 1) if name == "lora_core" else shape)
    axis = _rank_axis(name)
    if expected[axis] == 1 and len(given_shape) == 2 and given_shape[axis] == 0:
        expected[axis] = 0
    return tuple(expected)


def from_file(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of a file as a layer has it. Of no triplets, one triplet of zeros."""
    shape, axis = list(tensor.shape), _rank_axis(name)
    if not shape[axis]:
        shape[axis] = 1
        tensor = tensor.new_zeros(shape)
    return tensor.squeeze(1) if name == "lora_core" else tensor


def _rank_axis(name: str) -> int:
    """Return the axis of a tensor in a file whose size is the rank."""
    return 1 if name == "lora_B" else 0


def rank_pattern_to_peft(adapters: Mapping[str, AdaLoRA]) -> dict[str, list[bool]] | None:
    """Return PEFT's rank pattern: init_r flags a layer, r of them True. None if no rank shrank."""
    if all(adapter.r == adapter.init_r for adapter in adapters.values()):
        return None
    return {
        f"{name}.lora_E": [i < adapter.r for i in range(adapter.init_r)]
        for name, adapter in adapters.items()
    }


def rank_pattern_from_peft(pattern: Any, init_r: int) -> dict[str, int]:
    """Return the rank of each layer, at least 1, as an AdaptSpec's rank_pattern.

    Args:
        pattern: PEFT's rank pattern, not checked yet.
        init_r: how many flags each layer must have.

    Raises:
        ValueError: the pattern is malformed.
    """
    if not isinstance(pattern, dict):
        raise ValueError(
            f"rank_pattern={pattern!r} must be a dict from layers' lora_E to lists of flags"
        )
    ranks: dict[str, int] = {}
    # Longest first: the first pattern that matches counts, and a short name may be the end of a
    # longer one.
    for key in sorted(pattern, key=lambda key: -len(str(key))):
        match, flags = _PATTERN_KEY.fullmatch(key) if isinstance(key, str) else None, pattern[key]
        is_flags = isinstance(flags, list) and all(isinstance(flag, bool) for flag in flags)
        if match is None or not is_flags:
            raise ValueError(
                f"rank_pattern[{key!r}]={str(flags)[:200]} must be a layer's lora_E and a list of "
                "flags"
            )
        if len(flags) != init_r:
            raise ValueError(
                f"rank_pattern[{key!r}] has {len(flags)} flags for init_r={init_r} triplets"
            )
        name = match[1]
        expression = name if expressions.is_plain(name) else f"^{re.escape(name)}"
        ranks[expression] = max(1, sum(flags))
    return ranks
