"""Whether a contender is right: its error against float64, held against the eager chain's."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F

from lorafast.bench.contender import Contender, seed_of
from lorafast.bench.impl import Impl
from lorafast.bench.memory import is_out_of_memory
from lorafast.bench.row import MAX_ERROR_RATIO
from lorafast.bench.textbook import frozen_columns
from lorafast.testing import Case, Yardstick, chain, make


def stages(impl: Impl, method: str, R: int) -> tuple[int, ...]:
    """How many columns of lora_B are frozen, each time a contender is judged: LaMDA's schedule freezes some, then all."""
    return (
        tuple(dict.fromkeys((0, R // 2, R)))
        if impl.base == "lorafast" and method in ("lamda", "lamda++")
        else (0,)
    )


def worst(found: Iterable[tuple]) -> tuple:
    """Of ratios, each with its name, stage by stage: the first that is wrong, else the largest."""
    kept = []
    for one in found:
        kept.append(one)
        if one[0] > MAX_ERROR_RATIO:
            return one
    return max(kept)


def at_stage(name: str, frozen: int, R: int) -> str:
    """What erred, and after how many columns were frozen."""
    return f"{name} with {frozen} of {R} columns frozen" if frozen else name


class Verifier:
    """The yardsticks of one problem: one per formula, kept while contenders that compute the same come by."""

    def __init__(self, draws: tuple[int, ...], device: torch.device) -> None:
        self._draws, self._device, self._kept = draws, device, {}

    def worst(self, contender: Contender) -> tuple[float, str, int]:
        """The worst error ratio, of what, and over how many tokens: all, or as many as float64 has room for."""
        if contender.astray:
            return math.inf, f"{contender.astray[0]}, which must not train,", contender.case.M
        found = worst(
            self._at_stage(contender, count)
            for count in stages(contender.impl, contender.method, contender.case.R)
        )
        if contender.frozen:
            contender.freeze(0)
        return found

    def _at_stage(self, contender: Contender, count: int) -> tuple[float, str, int]:
        if count:
            contender.freeze(count)
        case = contender.case
        while True:
            try:
                ratios = self._ratios(contender, case)
                name = max(ratios, key=ratios.get)
                return ratios[name], at_stage(name, contender.frozen, case.R), case.M
            except Exception as error:
                if not is_out_of_memory(error) or case.M < 2:
                    raise
            self._kept.clear()
            case = dataclasses.replace(case, M=case.M // 2)

    def _ratios(self, contender: Contender, case: Case) -> dict[str, float]:
        key = (case, contender.trained, contender.frozen)
        if key not in self._kept:
            self._kept.clear()
            made = [self._make(case, draw) for draw in self._draws]

            def truth(case: Case, t: dict[str, torch.Tensor | None]) -> torch.Tensor:
                if not contender.impl.adapts:
                    return F.linear(t["x"], t["weight"], t["bias"])
                return chain(case, t | {"lora_B": frozen_columns(t["lora_B"], contender.frozen)})

            self._kept[key] = Yardstick(case, made, truth, contender.trained)
        yardstick, draws = self._kept[key], iter(self._draws)
        return yardstick.ratios(lambda tensors: contender.outcome(tensors, next(draws)))

    def _make(self, case: Case, draw: int) -> dict[str, torch.Tensor | None]:
        tensors = make(case, draw, self._device, sliced=False)
        return tensors | ({"seed": seed_of(draw, self._device)} if case.dropout else {})
