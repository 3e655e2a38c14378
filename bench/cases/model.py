"""lorafast-bench model: a pretrained model, trained on real text, then stepped by batch size."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from lorafast import testing
from lorafast.bench.cases import implementations, quantised_base, recipes
from lorafast.bench.cases.candidate import adapter_parameters, form_of, route
from lorafast.bench.cases.choices import DENSE
from lorafast.bench.cases.corpus import corpus
from lorafast.bench.cases.encoder import Encoder
from lorafast.bench.cases.implementations import FROZEN_KEY, Impl
from lorafast.bench.cases.rounds import time_rows
from lorafast.bench.cases.train_task import FULL_LR, Batch, TrainTask, build
from lorafast.bench.measure import compiled, memory
from lorafast.bench.measure.timing import Timer
from lorafast.bench.report import fill_record
from lorafast.bench.report.progress import Progress
from lorafast.bench.report.record import Record
from lorafast.testing import SHORT

Key = tuple[Impl, str]

# In fp32 without dropout, two correct implementations of a method have the same losses: at the
# default rates, rounding alone makes them differ by 1e-5 after 200 steps.
MAX_LOSS_GAP = 1e-3
# The number of texts over which a model's error ratio is taken.
CHECKED_TEXTS = 16
# The number of first training steps that are not timed.
UNTIMED_STEPS = 3
# The number of batches for an init that reads gradients.
INIT_BATCHES = 4
# The batch size of the held-out examples.
HELD_OUT_BATCH = 32


class Plan(NamedTuple):
    """What to train and to step: every method by every implementation."""

    model: str
    impls: tuple[Impl, ...]
    methods: tuple[str, ...]
    batch_sizes: tuple[int, ...]
    seq: int
    device: torch.device
    dtype: torch.dtype
    R: int
    dropout: float
    dropout_on: str
    steps: int
    train_batch: int
    lr: float | None
    rounds: int
    seconds: float
    warmup: int
    seed: int
    base_formats: tuple[str, ...] = (DENSE,)

    @property
    def candidates(self) -> tuple[Key, ...]:
        """Implementation and method of every row on one base."""
        return implementations.candidates(self.impls, self.methods)


def run(plan: Plan, progress: Progress) -> Iterator[list[Record]]:
    """Yield, for every base, the rows of training, then those of every batch size."""
    with compiled.strict(any(impl.compile for impl in plan.impls)):
        for base_format in plan.base_formats:
            yield from _run_on(base_format, plan, progress)


def _run_on(base_format: str, plan: Plan, progress: Progress) -> Iterator[list[Record]]:
    """Yield the rows on one base; its models are gone before the next one's are made."""
    model_run = _ModelRun(plan, progress, base_format)
    if plan.steps:
        yield model_run.train()
    for batch_size in plan.batch_sizes:
        yield model_run.step(batch_size)


def progress_total(plan: Plan) -> int:
    """Return how often a run calls progress.begin."""
    count = len(plan.candidates)
    on_one = count + math.ceil(plan.steps / 10) + len(plan.batch_sizes) * (count + 1)
    return len(plan.base_formats) * on_one


class _ModelRun:
    """The encoder, its text and all training tasks, kept from training to the last batch size."""

    def __init__(self, plan: Plan, progress: Progress, base_format: str = DENSE) -> None:
        self.plan, self.progress, self.base_format = plan, progress, base_format
        self.name = plan.model if base_format == DENSE else f"{plan.model} in {base_format}"
        self.encoder = Encoder(plan.model, plan.dtype, plan.device)
        self.text = corpus()
        self.tasks: dict[Key, TrainTask] = {}
        self.unavailable: dict[Key, Record] = {}
        self.wrong: dict[Key, str] = {}
        self.errors: dict[Key, tuple[float, str]] = {}
        batch = self._batches(CHECKED_TEXTS, 1)[0]
        for key in plan.candidates:
            progress.begin(f"{self.name}: {self._record('training', key, 1).label}")
            try:
                task = self.tasks[key] = self._build(*key)
                self.errors[key] = task.worst_error_ratio(batch, plan.seed)
            except Exception as error:
                self._failed(key, error)

    def train(self) -> list[Record]:
        """Train all tasks; each batch is seen by every task before the next one."""
        records = self._records("training", self.plan.train_batch)
        losses, times = self._train_steps(records)
        held_out = self._held_out()
        untimed = min(UNTIMED_STEPS, self.plan.steps - 1)
        frozen = times.get(FROZEN_KEY, [])[untimed:]
        for key, values in losses.items():
            record, task = records[key], self.tasks[key]
            fill_record.set_times(record, times[key][untimed:], frozen, untimed)
            record.accuracy = task.accuracy(held_out)
            record.lr = None if key == FROZEN_KEY else self._lr(key[1])
            _set_losses(record, [round(value.item(), 6) for value in values])
            self._set_sizes(record, task)
            if record.ok:
                try:
                    record.peak_bytes = self._training_peak(task)
                except Exception as error:
                    self._failed(key, error, records)
        self._compare_losses(records)
        # A row that is wrong in training is wrong at every batch size.
        self.wrong = {key: r.reason for key, r in records.items() if r.status == "wrong"}
        for task in self.tasks.values():
            task.end_schedule()
        return list(records.values())

    def step(self, batch_size: int) -> list[Record]:
        """Count the bytes of a step at this batch size, then time it in rounds."""
        plan = self.plan
        batch = self._batches(batch_size, 1)[0]
        records = self._records("step", batch_size)
        if any(impl.compile for impl in plan.impls):
            compiled.reset()
        for key in plan.candidates:
            self.progress.begin(f"{self.name}, batch {batch_size}: {records[key].label}")
            if records[key].ok:
                try:
                    self._count_bytes(self.tasks[key], records[key], batch)
                except Exception as error:
                    self._failed(key, error, records)
        self.progress.begin(f"{self.name}, batch {batch_size}: rounds")
        steps = {key: self.tasks[key].step(batch, plan.seed) for key, r in records.items() if r.ok}

        def failed(key: Key, error: Exception) -> None:
            self._failed(key, error, records)

        time_rows(records, steps, plan, plan.device, failed, self.progress)
        return list(records.values())

    def _train_steps(
        self, records: dict[Key, Record]
    ) -> tuple[dict[Key, list[torch.Tensor]], dict[Key, list[tuple[float, ...]]]]:
        """Return the losses and times of every task that took all steps."""
        plan, timer = self.plan, Timer(self.plan.device)
        losses: dict[Key, list[torch.Tensor]] = {key: [] for key, r in records.items() if r.ok}
        times: dict[Key, list[tuple[float, ...]]] = {key: [] for key in losses}
        for index, batch in enumerate(self._batches(plan.train_batch, plan.steps)):
            if index % 10 == 0:
                self.progress.begin(f"{self.name}: training, step {index} of {plan.steps}")
            # The seed of the masks differs by step, and by the run's seed.
            seed = plan.seed * plan.steps + index
            for key in tuple(losses):
                try:
                    step = self.tasks[key].step(batch, seed, losses[key])
                    times[key].append(timer.time(step))
                except Exception as error:
                    self._failed(key, error, records)
                    del losses[key]
        return losses, times

    def _build(self, impl: Impl, method: str) -> TrainTask:
        plan, adapter, batches = self.plan, None, []
        if impl.has_adapter:
            adapter = recipes.spec(method, plan.R, plan.dropout, plan.dropout_on)
            if recipes.RECIPES[method].needs_gradients:
                # Drawn with another seed than the training batches.
                batches = self._batches(plan.train_batch, INIT_BATCHES, plan.seed + 1)
        lr = self._lr(method)
        return build(
            impl,
            method,
            adapter,
            self.encoder,
            plan.seed,
            lr,
            plan.steps,
            plan.R,
            batches,
            self.base_format,
        )

    def _lr(self, method: str) -> float:
        """Return the learning rate of what trains in the encoder."""
        if self.plan.lr is not None:
            return self.plan.lr
        return recipes.RECIPES[method].lr if method in recipes.RECIPES else FULL_LR

    def _batches(self, size: int, count: int, seed: int | None = None) -> list[Batch]:
        """Return batches of the training text, shuffled anew whenever all of it has been used."""
        generator = torch.Generator().manual_seed(self.plan.seed if seed is None else seed)
        order: list[int] = []
        while len(order) < size * count:
            order += torch.randperm(len(self.text.train), generator=generator).tolist()
        chosen = [self.text.train[index] for index in order[: size * count]]
        return [
            self.encoder.batch(chosen[start : start + size], self.plan.seq)
            for start in range(0, len(chosen), size)
        ]

    def _held_out(self) -> list[Batch]:
        text = self.text.held_out
        return [
            self.encoder.batch(list(text[start : start + HELD_OUT_BATCH]), self.plan.seq)
            for start in range(0, len(text), HELD_OUT_BATCH)
        ]

    def _record(self, bench: str, key: Key, batch_size: int) -> Record:
        (impl, method), plan = key, self.plan
        # The encoder's optimizer, which is the last one, gives the row its name.
        optimizer = type(self.tasks[key].optimizers[-1]).__name__ if key in self.tasks else "AdamW"
        return Record(
            bench,
            str(impl),
            method,
            str(plan.device),
            SHORT[plan.dtype],
            plan.seed,
            batch_size * plan.seq,
            plan.R,
            plan.dropout,
            compile=impl.compile,
            model=plan.model,
            batch_size=batch_size,
            seq=plan.seq,
            optimizer=optimizer,
            route="inductor" if impl.compile else "torch",
            base_format=self.base_format,
        )

    def _records(self, bench: str, batch_size: int) -> dict[Key, Record]:
        """Return the row of every candidate, with what is known before its steps."""
        records = {key: self._record(bench, key, batch_size) for key in self.plan.candidates}
        for key, record in records.items():
            if key in self.errors:
                tokens = CHECKED_TEXTS * self.plan.seq
                fill_record.set_error_ratio(record, *self.errors[key], tokens)
            if key in self.wrong:
                record.fail("wrong", self.wrong[key])
            if key in self.unavailable:
                record.fail(self.unavailable[key].status, self.unavailable[key].reason)
            elif self.tasks[key].layers:
                _describe_layers(record, self.tasks[key])
        return records

    def _failed(self, key: Key, error: Exception, records: dict[Key, Record] | None = None) -> None:
        if records is None:
            record = self.unavailable[key] = self._record("step", key, 1)
        else:
            record = records[key]
        fill_record.set_failure(record, error, key[0])
        fill_record.free_memory(self.plan.device)

    def _count_bytes(self, task: TrainTask, record: Record, batch: Batch) -> None:
        step, device = task.step(batch, self.plan.seed), self.plan.device
        step(lambda: None)  # compiles, and allocates the optimizer's state
        self._set_sizes(record, task)
        for optimizer in task.optimizers:
            optimizer.zero_grad()
        constant = [*task.model.parameters(), *task.model.buffers()]
        record.saved_bytes = testing.saved(lambda: task.loss(batch), {}, constant).own
        record.activation_bytes = memory.measure(lambda: task.loss(batch), device).held
        record.peak_bytes = memory.measure(lambda: step(lambda: None), device).peak

    def _training_peak(self, task: TrainTask) -> int:
        """Return the peak of one more step at the training's batch size, without its schedule."""
        schedule, task.schedule = task.schedule, None
        step = task.step(self._batches(self.plan.train_batch, 1)[0], self.plan.seed)
        peak = memory.measure(lambda: step(lambda: None), self.plan.device).peak
        task.schedule = schedule
        return peak

    def _set_sizes(self, record: Record, task: TrainTask) -> None:
        """Enter the sizes that do not depend on the batch."""
        record.trainable, record.grad_bytes = task.trainable
        held = [*task.model.parameters(), *task.model.buffers()]
        record.weight_bytes = _bytes(held + quantised_base.statistics(task.model))
        states = [optimizer.state_dict() for optimizer in task.optimizers]
        record.optimizer_bytes = _bytes(list(_tensors(states)))

    def _compare_losses(self, records: dict[Key, Record]) -> None:
        """Mark rows of lorafast as wrong whose losses differ from PEFT's.

        With dropout or in half precision, two correct implementations differ too.
        """
        if self.plan.dtype != torch.float32 or self.plan.dropout:
            return
        for (impl, method), record in records.items():
            baseline = records.get((Impl("peft"), method))
            if not impl.uses_lorafast or not baseline or not (record.ok and baseline.ok):
                continue
            gap, step = record.loss_gap(baseline)
            if not gap <= MAX_LOSS_GAP:
                reason = f"the loss of step {step} is {gap:.2g} from PEFT's"
                record.fail("wrong", f"{reason}; at most {MAX_LOSS_GAP:g} is right")


def _set_losses(record: Record, losses: list[float]) -> None:
    """Enter the losses up to the first that is not finite, which makes the row wrong."""
    end = next((step for step, loss in enumerate(losses) if not math.isfinite(loss)), None)
    if end is not None:
        record.fail("wrong", f"the loss of step {end} is {losses[end]}")
    record.losses = losses[:end]


def _describe_layers(record: Record, task: TrainTask) -> None:
    """Enter what the row says about the adapted layers, read from the first one."""
    first = next(iter(task.layers.values()))
    factors = adapter_parameters(first)
    record.adapter_dtype = SHORT[factors["lora_A"].dtype]
    form = form_of(task.impl, task.method, task.adapter, factors)
    record.dropout_on = form.dropout_on if form.magnitude else None
    if task.impl.uses_lorafast and not task.impl.compile:
        record.route = route(first, record.M)


def _tensors(state: object) -> Iterator[torch.Tensor]:
    """Yield every tensor of a nested state: an optimizer may hold another one's state."""
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, dict | list | tuple):
        for value in state.values() if isinstance(state, dict) else state:
            yield from _tensors(value)


def _bytes(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)
