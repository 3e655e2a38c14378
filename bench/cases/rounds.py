"""The timed rounds of the rows of one problem."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch

from lorafast.bench.cases.implementations import FROZEN_KEY, Impl
from lorafast.bench.measure.timing import Mark, Step, Timer, interleave
from lorafast.bench.report import fill_record
from lorafast.bench.report.progress import Progress
from lorafast.bench.report.record import Record

Key = tuple[Impl, str]


class Pace(Protocol):
    """How long to measure. seconds: the limit of the rounds of one problem."""

    rounds: int
    seconds: float
    warmup: int


def time_rows(
    records: Mapping[Key, Record],
    steps: Mapping[Key, Step],
    pace: Pace,
    device: torch.device,
    failed: Callable[[Key, Exception], None],
    progress: Progress,
) -> dict[Key, list[tuple[float, ...]]]:
    """Enter the times of interleaved rounds of the steps into the records; return the times."""
    samples = interleave(
        dict(steps), Timer(device), pace.rounds, pace.warmup, failed, pace.seconds,
        fill_record.MIN_ROUNDS, progress.rounds,
    )  # fmt: skip
    for key, phases in samples.items():
        fill_record.set_times(records[key], phases, samples.get(FROZEN_KEY), pace.warmup)
    return samples


def training_step(
    call: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    dy: torch.Tensor,
    clear_grads: Callable[[], None],
) -> Step:
    """Return a step of two phases: forward, and backward with the gradient of x."""

    def step(mark: Mark) -> None:
        x.grad = None
        clear_grads()
        mark()
        y = call(x)
        mark()
        y.backward(dy)
        mark()

    return step
