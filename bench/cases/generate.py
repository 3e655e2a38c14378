"""lorafast-bench generate: a small Llama generates text, every implementation beside its base."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from lorafast.bench.cases import implementations, recipes
from lorafast.bench.cases.generate_task import VOCABULARY, GenerateTask, Size, build, llama
from lorafast.bench.cases.implementations import Impl
from lorafast.bench.cases.rounds import Key, time_rows
from lorafast.bench.measure import memory
from lorafast.bench.measure.timing import Mark, Step
from lorafast.bench.report import fill_record
from lorafast.bench.report.progress import Progress
from lorafast.bench.report.record import Record
from lorafast.testing import SHORT


class Plan(NamedTuple):
    """What to generate: every method by every implementation.

    prompt, tokens: the lengths of the prompt and of the text that one call makes of it.
    """

    size: Size
    prompt: int
    tokens: int
    impls: tuple[Impl, ...]
    methods: tuple[str, ...]
    R: int
    device: torch.device
    dtype: torch.dtype
    rounds: int
    seconds: float
    warmup: int
    seed: int

    @property
    def candidates(self) -> tuple[Key, ...]:
        """Implementation and method of every row."""
        return implementations.candidates(self.impls, self.methods)


def progress_total(plan: Plan) -> int:
    """Return how often a run calls progress.begin."""
    return len(plan.candidates) + 1


def run(plan: Plan, progress: Progress) -> Iterator[list[Record]]:
    """Yield the rows, all at once."""
    records = {key: _record(plan, *key) for key in plan.candidates}
    base = llama(plan.size, plan.dtype, plan.device, plan.seed)
    generator = torch.Generator().manual_seed(plan.seed)
    prompt = torch.randint(VOCABULARY, (1, plan.prompt), generator=generator).to(plan.device)
    tasks: dict[Key, GenerateTask] = {}

    def failed(key: Key, error: Exception) -> None:
        fill_record.set_failure(records[key], error, key[0])
        tasks.pop(key, None)
        fill_record.free_memory(plan.device)

    for key, record in records.items():
        progress.begin(f"{plan.size}: {record.label}")
        try:
            tasks[key] = _examined(plan, key, record, base, prompt)
        except Exception as error:
            failed(key, error)
    progress.begin(f"{plan.size}: rounds of {plan.tokens} tokens")
    # A wrong row shows no speed, so it is not timed.
    steps = {key: _step(task, prompt, plan) for key, task in tasks.items() if records[key].ok}
    time_rows(records, steps, plan, plan.device, failed, progress)
    yield list(records.values())


def _record(plan: Plan, impl: Impl, method: str) -> Record:
    return Record(
        "generate",
        str(impl),
        method,
        str(plan.device),
        SHORT[plan.dtype],
        plan.seed,
        plan.tokens,
        plan.R,
        0.0,
        model=str(plan.size),
        batch_size=1,
        seq=plan.prompt,
        inference=True,
    )


def _examined(
    plan: Plan, key: Key, record: Record, base: nn.Module, prompt: torch.Tensor
) -> GenerateTask:
    """Build a task, check it and measure its memory."""
    impl, method = key
    adapter = recipes.spec(method, plan.R, 0.0) if impl.has_adapter else None
    task = build(impl, method, adapter, base, plan.seed)
    record.adapter_dtype, record.route = task.adapter_dtype, task.route
    ratio = task.error_ratio(prompt, plan.tokens)
    task.forget_references()
    fill_record.set_error_ratio(record, ratio, "logits", plan.tokens)
    record.peak_bytes = memory.measure(lambda: task.generate(prompt, plan.tokens), plan.device).peak
    return task


def _step(task: GenerateTask, prompt: torch.Tensor, plan: Plan) -> Step:
    """Return a step of one phase: a call of generate()."""

    def step(mark: Mark) -> None:
        mark()
        task.generate(prompt, plan.tokens)
        mark()

    return step
