"""The error of a candidate against float64, as a ratio to the eager chain's error."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from lorafast.engine import philox
from lorafast.engine.error_rule import MAX_ERROR_RATIO
from lorafast.runtime.devices import is_out_of_memory
from lorafast.testing import Case, Yardstick, chain, make

if TYPE_CHECKING:
    from lorafast.bench.cases.candidate import Candidate
    from lorafast.bench.cases.implementations import Impl


def freezing_stages(impl: Impl, method: str, R: int) -> tuple[int, ...]:
    """Return the numbers of frozen columns of lora_B at which a candidate is checked.

    LaMDA's schedule freezes some columns and later all of them; other methods freeze none.
    """
    if impl.base == "lorafast" and method in ("lamda", "lamda++"):
        return tuple(dict.fromkeys((0, R // 2, R)))
    return (0,)


def worst_ratio(stages: Iterable[tuple]) -> tuple:
    """Return the first stage whose ratio is wrong, otherwise the one with the largest ratio.

    A stage is a tuple that begins with its ratio. Stages after the first wrong one are not run.
    """
    found = []
    for stage in stages:
        found.append(stage)
        if stage[0] > MAX_ERROR_RATIO:
            return stage
    return max(found)


def stage_name(name: str, frozen_columns: int, R: int) -> str:
    """Return the name of a tensor, with the number of frozen columns if there are any."""
    return f"{name} with {frozen_columns} of {R} columns frozen" if frozen_columns else name


def detach_columns(B: torch.Tensor, count: int) -> torch.Tensor:
    """Return B [N,R] without a gradient for its first `count` columns."""
    return torch.cat((B[:, :count].detach(), B[:, count:]), 1) if count else B


def first_seed(draw: int, device: torch.device) -> torch.Tensor:
    """Return the dropout seed that the first layer draws after torch.manual_seed(draw)."""
    torch.manual_seed(draw)
    return philox.draw_seed(device)


def _stages(candidate: Candidate) -> tuple[int, ...]:
    if not candidate.trained:
        return (0,)  # frozen columns change no output
    return freezing_stages(candidate.impl, candidate.method, candidate.case.R)


class Verifier:
    """Error ratios of the candidates of one problem.

    The truth and the eager chain's error are kept while consecutive candidates compute the same
    formula.
    """

    def __init__(self, draws: tuple[int, ...], device: torch.device) -> None:
        self._draws, self._device = draws, device
        self._yardsticks: dict[tuple, Yardstick] = {}

    def worst(self, candidate: Candidate) -> tuple[float, str, int]:
        """Return the worst error ratio, the name of its tensor, and the number of tokens used.

        The number is the problem's M, or less where float64 does not fit in memory.
        """
        if candidate.wrongly_trained:
            name = f"{candidate.wrongly_trained[0]}, which must not train,"
            return math.inf, name, candidate.case.M
        found = worst_ratio(self._at_stage(candidate, count) for count in _stages(candidate))
        if candidate.frozen_columns:
            candidate.freeze(0)
        return found

    def _at_stage(self, candidate: Candidate, count: int) -> tuple[float, str, int]:
        if count:
            candidate.freeze(count)
        case = candidate.case
        while True:
            try:
                ratios = self._ratios(candidate, case)
                name = max(ratios, key=ratios.get)
                shown = stage_name(name, candidate.frozen_columns, case.R)
                return ratios[name], shown, case.M
            except Exception as error:
                if not is_out_of_memory(error) or case.M < 2:
                    raise
            self._yardsticks.clear()
            case = dataclasses.replace(case, M=case.M // 2)

    def _ratios(self, candidate: Candidate, case: Case) -> dict[str, float]:
        key = (case, candidate.trained, candidate.frozen_columns)
        if key not in self._yardsticks:
            # One at a time: a yardstick holds float64 tensors of the problem's size.
            self._yardsticks.clear()
            self._yardsticks[key] = self._yardstick(candidate, case)
        draws = iter(self._draws)
        return self._yardsticks[key].ratios(
            lambda tensors: candidate.outputs_and_grads(tensors, next(draws))
        )

    def _yardstick(self, candidate: Candidate, case: Case) -> Yardstick:
        frozen, has_adapter = candidate.frozen_columns, candidate.impl.has_adapter

        def truth(
            case: Case,
            t: dict[str, torch.Tensor | None],
            factor_dtype: torch.dtype | None = None,
        ) -> torch.Tensor:
            if not has_adapter:
                return F.linear(t["x"], t["weight"], t["bias"])
            t = t | {"lora_B": detach_columns(t["lora_B"], frozen)}
            return chain(case, t, factor_dtype=factor_dtype)

        made = [self._make(case, draw) for draw in self._draws]
        return Yardstick(case, made, truth, candidate.trained)

    def _make(self, case: Case, draw: int) -> dict[str, torch.Tensor | None]:
        tensors = make(case, draw, self._device, sliced=False)
        if case.dropout:
            tensors["seed"] = first_seed(draw, self._device)
        return tensors
