"""Shapes of linears by size or by the model they come from: K in, N out."""

from __future__ import annotations

import re
from typing import NamedTuple


class Shape(NamedTuple):
    """A linear with K inputs and N outputs."""

    K: int
    N: int


# Every distinct linear of a block.
MODELS = {
    "minilm": (Shape(384, 384), Shape(384, 1536), Shape(1536, 384)),
    "bart-large": (Shape(1024, 1024), Shape(1024, 4096), Shape(4096, 1024)),
    "llama3-8b": (Shape(4096, 4096), Shape(4096, 1024), Shape(4096, 14336), Shape(14336, 4096)),
}


def parse(text: str) -> tuple[Shape, ...]:
    """ "4096x14336" (in x out), or a model's name. ValueError saying which there are."""
    if text in MODELS:
        return MODELS[text]
    sizes = re.fullmatch(r"(\d+)x(\d+)", text)
    if not sizes or not all(int(size) for size in sizes.groups()):
        raise ValueError(
            f"{text!r} is no INxOUT such as 4096x14336, and none of {', '.join(MODELS)}"
        )
    return (Shape(*map(int, sizes.groups())),)
