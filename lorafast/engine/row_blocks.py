"""Blocks of rows of a matrix, so that no mask and no wide temporary has the matrix's size."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lorafast.engine.problem import tokens

# Small enough on a CPU for an fp32 block to stay in cache; large enough elsewhere to hide launches.
CPU_ELEMENTS = 1 << 19
ELEMENTS = 1 << 25


def flatten_tokens(x: torch.Tensor) -> torch.Tensor:
    """The activation as [M, width]: itself or a view where its strides allow one, else a copy."""
    # A single row may have any stride; a view of it has the usual one, which TMA needs.
    return x if x.dim() == 2 and x.shape[0] != 1 else x.reshape(tokens(x), x.shape[-1])


def row_blocks(x2: torch.Tensor) -> Iterator[slice]:
    """Slices of rows that cover the matrix, each of at least one row; none if it has no rows."""
    elements = CPU_ELEMENTS if x2.device.type == "cpu" else ELEMENTS
    step = max(1, elements // max(1, x2.shape[1]))
    for start in range(0, x2.shape[0], step):
        yield slice(start, min(start + step, x2.shape[0]))
