"""Errors against float64, as ratios to those of the eager chain."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable

import torch

from lorafast.engine.error_rule import ratio
from lorafast.testing.layers import chain, ours, run
from lorafast.testing.problems import GRADIENTS, Case, make


class Yardstick:
    """The float64 truth of a case over all seeds, and the eager chain's distance from it.

    Where the factors are wider than x, the chain in their dtype is a second yardstick, because the
    first one loses what x's dtype cannot hold, small gradients in fp16. What is kept for backward
    has x's dtype, so that one rounding to it, eps/2, is the least error there.

    function: the chain; it takes factor_dtype, as chain does.
    """

    def __init__(
        self,
        case: Case,
        made: Iterable[dict[str, torch.Tensor | None]],
        function: Callable = chain,
        trained: Iterable[str] = GRADIENTS,
    ) -> None:
        self.case, self.made = case, tuple(made)
        self._truths = [run(function, case, tensors, True, trained) for tensors in self.made]
        self._rms = {name: 0.0 for name in self._truths[0]}
        for truth in self._truths:
            for name, value in truth.items():
                self._rms[name] += value.square().sum().item()
        self._chains = [self._measured(functools.partial(run, function, trained=trained), 8)]
        if torch.finfo(case.factor_dtype).bits > torch.finfo(case.dtype).bits:
            wide = functools.partial(function, factor_dtype=case.factor_dtype)
            self._chains.append(self._measured(functools.partial(run, wide, trained=trained), 2))

    def ratios(
        self, outcome: Callable[[dict[str, torch.Tensor | None]], dict[str, torch.Tensor]]
    ) -> dict[str, float]:
        """Return max(e, f) ÷ max(e_chain, f) for y and each gradient that outcome(tensors) gives.

        e is the RMS error against float64 over all seeds, f = eps/8·rms(truth). Of two yardsticks
        the larger ratio counts; f of the second one is eps/2·rms(truth).
        """
        errors = self._squares(outcome)
        return {
            name: max(
                ratio(errors[name] ** 0.5, chain[name] ** 0.5, self._rms[name] ** 0.5, floor)
                for chain, floor in self._chains
            )
            for name in self._rms
        }

    def _measured(self, outcome: Callable, parts: int) -> tuple[dict[str, float], float]:
        """The squared errors of a chain, and the floor eps/parts."""
        case = self.case
        return (
            self._squares(lambda tensors: outcome(case, tensors)),
            torch.finfo(case.dtype).eps / parts,
        )

    def _squares(self, outcome: Callable) -> dict[str, float]:
        sums = {name: 0.0 for name in self._rms}
        for tensors, truth in zip(self.made, self._truths, strict=True):
            got = outcome(tensors)
            for name, value in truth.items():
                # A missing gradient counts as infinitely wrong.
                missing = got.get(name) is None
                sums[name] += math.inf if missing else (got[name] - value).square().sum().item()
        return sums


def error_ratios(
    case: Case, function: Callable = ours, seeds: Iterable[int] = range(4)
) -> dict[str, float]:
    """Return the error ratios of function(case, tensors) for y and each gradient."""
    yardstick = Yardstick(case, (make(case, seed) for seed in seeds))
    return yardstick.ratios(lambda tensors: run(function, case, tensors))
