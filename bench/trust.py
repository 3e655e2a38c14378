"""Whether a contender is right: its error against float64, held against the eager chain's."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F

from lorafast.bench.contender import Contender, seed_of
from lorafast.bench.memory import is_out_of_memory
from lorafast.testing import Case, Yardstick, chain, make


class Verifier:
    """The yardsticks of one problem: one per formula, kept while contenders that compute the same come by."""

    def __init__(self, draws: tuple[int, ...], device: torch.device) -> None:
        self._draws, self._device, self._kept = draws, device, {}

    def worst(self, contender: Contender) -> tuple[float, str, int]:
        """The worst error ratio, of what, and over how many tokens: all, or as many as float64 has room for."""
        case = contender.case
        while True:
            try:
                ratios = self._ratios(contender, case)
                name = max(ratios, key=ratios.get)
                return ratios[name], name, case.M
            except Exception as error:
                if not is_out_of_memory(error) or case.M < 2:
                    raise
            self._kept.clear()
            case = dataclasses.replace(case, M=case.M // 2)

    def _ratios(self, contender: Contender, case: Case) -> dict[str, float]:
        key = (case, contender.trained)
        if key not in self._kept:
            self._kept.clear()
            made = [self._make(case, draw) for draw in self._draws]
            function = chain if contender.impl.adapts else _base
            self._kept[key] = Yardstick(case, made, function, contender.trained)
        yardstick, draws = self._kept[key], iter(self._draws)
        return yardstick.ratios(lambda tensors: contender.outcome(tensors, next(draws)))

    def _make(self, case: Case, draw: int) -> dict[str, torch.Tensor | None]:
        tensors = make(case, draw, self._device, sliced=False)
        return tensors | ({"seed": seed_of(draw, self._device)} if case.dropout else {})


def _base(case: Case, t: dict[str, torch.Tensor | None]) -> torch.Tensor:
    return F.linear(t["x"], t["weight"], t["bias"])
