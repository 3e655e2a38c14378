"""The error rule: what a computation may err against float64, by what the eager chain errs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

# A larger error ratio is wrong.
MAX_ERROR_RATIO = 2.0

Outputs = list[torch.Tensor]


class Comparison(NamedTuple):
    """A computation beside float64 and the eager chain.

    error_ratio: the largest of its outputs. repeats: True if two runs agree bit for bit.
    """

    error_ratio: float
    repeats: bool

    @property
    def why_wrong(self) -> str:
        """Why it is wrong, in words; "" if it is right."""
        if not self.error_ratio <= MAX_ERROR_RATIO:
            limit = f"at most {MAX_ERROR_RATIO:g} is right"
            return f"errs {self.error_ratio:.3g} times what eager errs; {limit}"
        return "" if self.repeats else "two runs differ"


def compare(
    run: Callable[[], Outputs], truth: Outputs, chain: Outputs, dtype: torch.dtype
) -> Comparison:
    """Run a computation twice, and apply the error rule to all outputs.

    truth: the outputs in float64. chain: those of stock torch in dtype.
    """
    first, second = run(), run()
    floor = torch.finfo(dtype).eps / 8
    error_ratio = max(
        ratio(_rms(found - t), _rms(eager - t), _rms(t), floor)
        for found, eager, t in zip(first, chain, truth, strict=True)
    )
    repeats = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    return Comparison(error_ratio, repeats)


def _rms(t: torch.Tensor) -> float:
    return float(t.square().mean().sqrt())


def ratio(error: float, chain_error: float, truth: float, floor: float) -> float:
    """Return the error ratio, never NaN.

    An error that is not finite counts as infinite, and 0 against 0 as 1.
    """
    if not math.isfinite(error):
        return math.inf
    if not math.isfinite(chain_error):
        return 0.0
    least = floor * truth
    top, bottom = max(error, least), max(chain_error, least)
    if bottom == 0:
        return 1.0 if top == 0 else math.inf
    return top / bottom
