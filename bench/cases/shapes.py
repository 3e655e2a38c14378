"""Shapes of linear layers, by size or by the name of a model."""

from __future__ import annotations

import re
from typing import NamedTuple

from lorafast.runtime.spelling import did_you_mean


class Shape(NamedTuple):
    """A linear layer with K inputs and N outputs."""

    K: int
    N: int


# The distinct linear layers of one block.
MODELS = {
    "minilm": (Shape(384, 384), Shape(384, 1536), Shape(1536, 384)),
    "bart-large": (Shape(1024, 1024), Shape(1024, 4096), Shape(4096, 1024)),
    "llama3-8b": (Shape(4096, 4096), Shape(4096, 1024), Shape(4096, 14336), Shape(14336, 4096)),
}


def parse(text: str) -> tuple[Shape, ...]:
    """Return the shapes that "4096x14336" (inputs x outputs) or the name of a model stands for.

    Raises ValueError, with the known models, for any other text.
    """
    if text in MODELS:
        return MODELS[text]
    sizes = re.fullmatch(r"(\d+)x(\d+)", text)
    if not sizes or not all(int(size) for size in sizes.groups()):
        known = ", ".join(MODELS)
        near = did_you_mean(text, MODELS)
        raise ValueError(f"{text!r} is no INxOUT such as 4096x14336, and none of {known}{near}")
    return (Shape(*map(int, sizes.groups())),)
