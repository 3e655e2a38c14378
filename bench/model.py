"""lorafast-bench model: a whole pretrained model, trained on real text, then stepped at several batch sizes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from lorafast import testing
from lorafast.bench import compiled, memory, recipes, row
from lorafast.bench import impl as impls
from lorafast.bench.clock import Clock, interleave
from lorafast.bench.contender import form_of, parts_of, route
from lorafast.bench.corpus import corpus
from lorafast.bench.encoder import Encoder
from lorafast.bench.impl import FROZEN_KEY, Impl
from lorafast.bench.progress import Progress
from lorafast.bench.record import Record
from lorafast.bench.trainee import WHOLE_RATE, Batch, Trainee, build
from lorafast.testing import SHORT

Key = tuple[Impl, str]

# In fp32 without dropout two right implementations of one method follow the same curve: at the default rates rounding alone sets
# them 1e-5 apart in 200 steps.
MAX_LOSS_GAP = 1e-3
# How many texts the error of a model's gradients is taken over.
JUDGED = 16
# The first steps of training, which are not timed.
UNTIMED = 3
# Batches that a start may read gradients of.
SAMPLED = 4


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

    @property
    def contenders(self) -> tuple[tuple[Impl, str], ...]:
        """Implementation and method of every row."""
        return impls.contenders(self.impls, self.methods)


def progress_total(plan: Plan) -> int:
    """How often a run calls progress.begin."""
    return (
        len(plan.contenders)
        + math.ceil(plan.steps / 10)
        + len(plan.batch_sizes) * (len(plan.contenders) + 1)
    )


def run(plan: Plan, progress: Progress) -> Iterator[list[Record]]:
    """First the rows of training, then those of every batch size."""
    with compiled.strict(plan.impls):
        whole = _ModelRun(plan, progress)
        if plan.steps:
            yield whole.train()
        for batch_size in plan.batch_sizes:
            yield whole.step(batch_size)


class _ModelRun:
    """The encoder, its text, and every trainee, kept from training to the last batch size."""

    def __init__(self, plan: Plan, progress: Progress) -> None:
        self.plan, self.progress = plan, progress
        self.encoder = Encoder(plan.model, plan.dtype, plan.device)
        self.text = corpus()
        self.trainees: dict[Key, Trainee] = {}
        self.refused: dict[Key, Record] = {}
        self.wrong: dict[Key, str] = {}
        self.errors: dict[Key, tuple[float, str]] = {}
        batch = self._batches(JUDGED, 1)[0]
        for key in plan.contenders:
            progress.begin(f"{plan.model}: {self._record('training', key, 1).label}")
            try:
                trainee = self.trainees[key] = self._build(*key)
                self.errors[key] = trainee.error(batch, plan.seed)
            except Exception as error:
                self._failed(key, error)

    def train(self) -> list[Record]:
        """Every trainee sees the same batch before any sees the next."""
        plan, clock = self.plan, Clock(self.plan.device)
        records = self._records("training", plan.train_batch)
        losses: dict[Key, list[torch.Tensor]] = {key: [] for key in self._able(records)}
        times: dict[Key, list[tuple[float, ...]]] = {key: [] for key in losses}
        for index, batch in enumerate(self._batches(plan.train_batch, plan.steps)):
            if index % 10 == 0:
                self.progress.begin(f"{plan.model}: training, step {index} of {plan.steps}")
            for key in tuple(losses):
                try:
                    times[key].append(
                        clock.time(self.trainees[key].step(batch, self._seed(index), losses[key]))
                    )
                except Exception as error:
                    self._failed(key, error, records)
                    del losses[key]
        held_out, untimed = self._held_out(), min(UNTIMED, plan.steps - 1)
        frozen = times.get(FROZEN_KEY, [])
        for key, values in losses.items():
            record, curve = records[key], [round(value.item(), 6) for value in values]
            row.enter_times(record, times[key][untimed:], frozen[untimed:], untimed)
            record.accuracy, record.lr = (
                self.trainees[key].accuracy(held_out),
                None if key == FROZEN_KEY else self._rate(key[1]),
            )
            astray = next(
                (step for step, value in enumerate(curve) if not math.isfinite(value)), None
            )
            if astray is not None:
                record.fail("wrong", f"the loss of step {astray} is {curve[astray]}")
            record.losses = curve[:astray]
            self._weigh(record, self.trainees[key])
            if record.status == "ok":
                try:
                    record.peak_bytes = self._peak(self.trainees[key])
                except Exception as error:
                    self._failed(key, error, records)
        self._compare(records)
        # What went wrong in training is wrong at every batch size.
        self.wrong = {
            key: record.reason for key, record in records.items() if record.status == "wrong"
        }
        for trainee in self.trainees.values():
            trainee.thaw()
        return list(records.values())

    def step(self, batch_size: int) -> list[Record]:
        """Bytes first, then time in rounds."""
        plan = self.plan
        batch = self._batches(batch_size, 1)[0]
        records = self._records("step", batch_size)
        if any(impl.compile for impl in plan.impls):
            compiled.forget()
        for key in plan.contenders:
            self.progress.begin(f"{plan.model}, batch {batch_size}: {records[key].label}")
            if key in self._able(records):
                try:
                    self._count(self.trainees[key], records[key], batch)
                except Exception as error:
                    self._failed(key, error, records)
        self.progress.begin(f"{plan.model}, batch {batch_size}: rounds")
        steps = {key: self.trainees[key].step(batch, plan.seed) for key in self._able(records)}
        samples = interleave(
            steps, Clock(plan.device), plan.rounds, plan.warmup, lambda key, error: self._failed(key, error, records),
            plan.seconds, row.LEAST_ROUNDS,
        )  # fmt: skip
        for key, phases in samples.items():
            row.enter_times(records[key], phases, samples.get(FROZEN_KEY), plan.warmup)
        return list(records.values())

    def _build(self, impl: Impl, method: str) -> Trainee:
        plan = self.plan
        adapter = (
            recipes.spec(method, plan.R, plan.dropout, plan.dropout_on) if impl.adapts else None
        )
        sampled = impl.adapts and recipes.RECIPES[method].sampled
        # Others than those the training walks through first, in their order.
        batches = self._batches(plan.train_batch, SAMPLED, plan.seed + 1) if sampled else []
        return build(
            impl,
            method,
            adapter,
            self.encoder,
            plan.seed,
            self._rate(method),
            plan.steps,
            plan.R,
            batches,
        )

    def _rate(self, method: str) -> float:
        """The learning rate for what trains of the encoder."""
        if self.plan.lr is not None:
            return self.plan.lr
        return recipes.RECIPES[method].rate if method in recipes.RECIPES else WHOLE_RATE

    def _optimizer(self, key: Key) -> str:
        """What steps the encoder, whose name it has."""
        return type(self.trainees[key].optimizers[-1]).__name__ if key in self.trainees else "AdamW"

    def _seed(self, index: int) -> int:
        """Of the masks of one training step."""
        return self.plan.seed * self.plan.steps + index

    def _batches(self, size: int, count: int, seed: int | None = None) -> list[Batch]:
        """The same batches for everybody: a walk through the shuffled training text, again and again."""
        generator = torch.Generator().manual_seed(self.plan.seed if seed is None else seed)
        picked: list[int] = []
        while len(picked) < size * count:
            picked += torch.randperm(len(self.text.train), generator=generator).tolist()
        chosen = [self.text.train[index] for index in picked[: size * count]]
        return [
            self.encoder.batch(chosen[i * size : (i + 1) * size], self.plan.seq)
            for i in range(count)
        ]

    def _held_out(self) -> list[Batch]:
        text = self.text.held_out
        return [
            self.encoder.batch(list(text[i : i + 32]), self.plan.seq)
            for i in range(0, len(text), 32)
        ]

    def _record(self, bench: str, key: Key, batch_size: int) -> Record:
        (impl, method), plan = key, self.plan
        return Record(
            bench, str(impl), method, str(plan.device), SHORT[plan.dtype], plan.seed, batch_size * plan.seq, plan.R, plan.dropout,
            compile=impl.compile, model=plan.model, batch_size=batch_size, seq=plan.seq, optimizer=self._optimizer(key),
            route="inductor" if impl.compile else "torch",
        )  # fmt: skip

    def _records(self, bench: str, batch_size: int) -> dict[Key, Record]:
        records = {key: self._record(bench, key, batch_size) for key in self.plan.contenders}
        for key, record in records.items():
            if key in self.errors:
                row.judge(record, *self.errors[key], JUDGED * self.plan.seq)
            if key in self.wrong:
                record.fail("wrong", self.wrong[key])
            if key in self.refused:
                record.fail(self.refused[key].status, self.refused[key].reason)
            elif self.trainees[key].layers:
                self._describe(record, self.trainees[key])
        return records

    def _describe(self, record: Record, trainee: Trainee) -> None:
        first = next(iter(trainee.layers.values()))
        record.adapter_dtype = SHORT[parts_of(first)["lora_A"].dtype]
        form = form_of(trainee.impl, trainee.method, trainee.adapter, parts_of(first))
        record.dropout_on = form.dropout_on if form.magnitude else None
        if trainee.impl.ours and not trainee.impl.compile:
            record.route = route(first, record.M)

    def _able(self, records: dict[Key, Record]) -> list[Key]:
        return [key for key, record in records.items() if record.status == "ok"]

    def _failed(self, key: Key, error: Exception, records: dict[Key, Record] | None = None) -> None:
        if records is None:
            self.refused[key] = self._record("step", key, 1)
            row.fail(self.refused[key], error, key[0])
        else:
            row.fail(records[key], error, key[0])
        row.release(self.plan.device)

    def _count(self, trainee: Trainee, record: Record, batch: Batch) -> None:
        step, device = trainee.step(batch, self.plan.seed), self.plan.device
        step(lambda: None)  # compiles, and makes the optimizer's state
        self._weigh(record, trainee)
        for optimizer in trainee.optimizers:
            optimizer.zero_grad()
        constant = [*trainee.model.parameters(), *trainee.model.buffers()]
        record.saved_bytes = testing.saved(lambda: trainee.loss(batch), {}, constant).own
        record.activation_bytes = memory.measured(lambda: trainee.loss(batch), device).held
        record.peak_bytes = memory.measured(lambda: step(lambda: None), device).peak

    def _peak(self, trainee: Trainee) -> int:
        """The most alive at once in one more step at the training's batch size, as its schedule has left it."""
        schedule, trainee.schedule = trainee.schedule, None
        step = trainee.step(self._batches(self.plan.train_batch, 1)[0], self.plan.seed)
        peak = memory.measured(lambda: step(lambda: None), self.plan.device).peak
        trainee.schedule = schedule
        return peak

    def _weigh(self, record: Record, trainee: Trainee) -> None:
        """Bytes that do not depend on the batch."""
        record.trainable, record.grad_bytes = trainee.trainable
        record.weight_bytes = _bytes([*trainee.model.parameters(), *trainee.model.buffers()])
        record.optimizer_bytes = _bytes(
            list(_tensors([optimizer.state_dict() for optimizer in trainee.optimizers]))
        )

    def _compare(self, records: dict[Key, Record]) -> None:
        """Two implementations of one method that do not walk together: ours is wrong until shown otherwise."""
        if self.plan.dtype != torch.float32 or self.plan.dropout:
            return
        for method in self.plan.methods:
            theirs = records.get((Impl("peft"), method))
            for (impl, other), ours in records.items():
                if (
                    impl.ours
                    and other == method
                    and theirs
                    and ours.status == theirs.status == "ok"
                ):
                    gap, step = ours.loss_gap(theirs)
                    if not gap <= MAX_LOSS_GAP:
                        ours.fail(
                            "wrong",
                            f"the loss of step {step} is {gap:.2g} from PEFT's; at most {MAX_LOSS_GAP:g} is right",
                        )


def _tensors(state: object) -> Iterator[torch.Tensor]:
    """Every tensor in a state, however deep: an optimizer may hold another."""
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, dict | list | tuple):
        for one in state.values() if isinstance(state, dict) else state:
            yield from _tensors(one)


def _bytes(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)
