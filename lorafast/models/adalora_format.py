"""AdaLoRA's triplets as PEFT's files have them: its keys, E as a column, the rank pattern, and the schedule's settings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from lorafast.methods.adalora import AdaLoRA
from lorafast.models import expressions

# What PEFT calls each part, after the layer's name.
WORDS = {"lora_A": "lora_A", "lora_B": "lora_B", "lora_core": "lora_E"}
# Where schedule.AdaLoRA leaves its settings on a model, in PEFT's words, and what a file says if there was none: PEFT's defaults,
# and the one step its config cannot do without.
SCHEDULE = "_lorafast_adalora"
SCHEDULE_FIELDS = {
    "total_step": 1, "tinit": 0, "tfinal": 0, "deltaT": 1, "beta1": 0.85, "beta2": 0.85, "orth_reg_weight": 0.5,
}  # fmt: skip
# A key of PEFT's rank pattern; until it has saved a file, with an adapter's name at its end.
_KEY = re.compile(r"(.+)\.lora_E(\.[^.]+)?")


def filed(part: str, tensor: torch.Tensor) -> torch.Tensor:
    """A part as a file has it: E [R,1]."""
    return tensor.unsqueeze(1) if part == "lora_core" else tensor


def filed_shape(part: str, shape: tuple[int, ...], given: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a part in a file. What PEFT has left nothing of has one triplet here, so the rank it gives may be 0."""
    wanted = list((*shape, 1) if part == "lora_core" else shape)
    at = _rank_of(part)
    if wanted[at] == 1 and len(given) == 2 and given[at] == 0:
        wanted[at] = 0
    return tuple(wanted)


def held(part: str, tensor: torch.Tensor) -> torch.Tensor:
    """A part of a file as a layer has it; of no triplet, one of zeros."""
    shape, at = list(tensor.shape), _rank_of(part)
    if not shape[at]:
        shape[at] = 1
        tensor = tensor.new_zeros(shape)
    return tensor.squeeze(1) if part == "lora_core" else tensor


def _rank_of(part: str) -> int:
    """Which of a part's sizes in a file is the rank."""
    return 1 if part == "lora_B" else 0


def pattern(adapters: Mapping[str, AdaLoRA]) -> dict[str, list[bool]] | None:
    """PEFT's rank pattern: of as many triplets as layers began with, as many as each has. None where none has lost any."""
    if all(adapter.r == adapter.init_r for adapter in adapters.values()):
        return None
    return {
        f"{name}.lora_E": [i < adapter.r for i in range(adapter.init_r)]
        for name, adapter in adapters.items()
    }


def ranks(pattern: Any, init_r: int) -> dict[str, int]:
    """Ranks by layer, as a plan has them, from PEFT's rank pattern; at least 1. ValueError if that is none."""
    if not isinstance(pattern, dict):
        raise ValueError(
            f"rank_pattern={pattern!r} must be a dict from layers' lora_E to lists of flags"
        )
    found: dict[str, int] = {}
    # The longest first: a shorter name may be another one's end.
    for key in sorted(pattern, key=lambda key: -len(str(key))):
        match, kept = _KEY.fullmatch(key) if isinstance(key, str) else None, pattern[key]
        if (
            match is None
            or not isinstance(kept, list)
            or not all(isinstance(one, bool) for one in kept)
        ):
            raise ValueError(
                f"rank_pattern[{key!r}]={str(kept)[:200]} must be a layer's lora_E and a list of flags"
            )
        if len(kept) != init_r:
            raise ValueError(
                f"rank_pattern[{key!r}] has {len(kept)} flags for init_r={init_r} triplets"
            )
        name = match[1]
        found[name if expressions.is_plain(name) else f"^{re.escape(name)}"] = max(1, sum(kept))
    return found
