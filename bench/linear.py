"""lorafast-bench linear: one layer, every implementation beside the frozen layer, by tokens, rank and dropout."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from lorafast import testing
from lorafast.bench import bandwidth, compiled, memory, recipes, row
from lorafast.bench import impl as impls
from lorafast.bench.clock import Clock, Mark, Step, interleave
from lorafast.bench.contender import Contender, Problem, build
from lorafast.bench.floor import floor
from lorafast.bench.impl import FROZEN_KEY, Impl
from lorafast.bench.progress import Progress
from lorafast.bench.record import Record
from lorafast.bench.trust import Verifier
from lorafast.testing import SHORT


class Plan(NamedTuple):
    """What to measure: every method by every implementation on every problem. `seconds` bounds the rounds of one problem."""

    problems: tuple[Problem, ...]
    impls: tuple[Impl, ...]
    methods: tuple[str, ...]
    dropout_on: str
    rounds: int
    seconds: float
    warmup: int
    seed: int

    @property
    def contenders(self) -> tuple[tuple[Impl, str], ...]:
        """Implementation and method of every row of one problem."""
        return impls.contenders(self.impls, self.methods)


def run(plan: Plan, progress: Progress) -> Iterator[list[Record]]:
    """The rows of one problem after another, each complete."""
    with compiled.strict(plan.impls):
        for problem in plan.problems:
            yield _ProblemRun(plan, problem, progress).measure()


def progress_total(plan: Plan) -> int:
    """How often a run calls progress.begin."""
    return len(plan.problems) * (len(plan.contenders) + 1)


class _ProblemRun:
    """All contenders on one problem."""

    def __init__(self, plan: Plan, problem: Problem, progress: Progress) -> None:
        self.plan, self.problem, self.progress = plan, problem, progress
        self.records = {key: self._record(*key) for key in plan.contenders}
        self.contenders: dict[tuple[Impl, str], Contender] = {}

    def measure(self) -> list[Record]:
        p, plan, tensors = self.problem, self.plan, {}
        try:
            shared = testing.make(
                testing.Case(testing.Form("frozen"), p.M, p.N, p.K, p.R, p.dtype, bias=p.bias),
                plan.seed,
                p.device,
                False,
            )
            tensors = {name: shared[name] for name in ("x", "dy", "weight", "bias")}
        except Exception as error:
            for key in self.records:
                self._failed(key, error)
            return list(self.records.values())
        verifier = Verifier(tuple(range(plan.seed, plan.seed + _draws(p))), p.device)
        for key in self.records:
            self.progress.begin(f"{p}: {self.records[key].label}")
            self._examine(key, verifier, tensors)
        del verifier
        row.release(p.device)
        self._time(tensors)
        return list(self.records.values())

    def _record(self, impl: Impl, method: str) -> Record:
        p, plan = self.problem, self.plan
        return Record(
            "linear", str(impl), method, str(p.device), SHORT[p.dtype], plan.seed, p.M, p.R, p.dropout, p.N, p.K, p.bias,
            compile=impl.compile,
        )  # fmt: skip

    def _build(
        self, key: tuple[Impl, str], tensors: dict[str, torch.Tensor], mask: bool = False
    ) -> Contender:
        (impl, method), p = key, self.problem
        adapter = None
        if impl.adapts:
            # The start is overwritten by the problem's own values; a residual would be taken out of the weight all share.
            fields = {"init": "zero"} if method == "lamda" else {}
            adapter = recipes.spec(method, p.R, p.dropout, self.plan.dropout_on, **fields)
        return build(impl, method, adapter, p, tensors["weight"], tensors["bias"], mask)

    def _examine(
        self, key: tuple[Impl, str], verifier: Verifier, tensors: dict[str, torch.Tensor]
    ) -> None:
        """Build it, hold it against the truth, count its bytes; whatever fails is this row's alone."""
        record = self.records[key]
        try:
            if key[0].compile:
                compiled.forget()
            contender = self._build(key, tensors, mask=True)
            record.adapter_dtype = (
                SHORT[contender.case.adapter_dtype] if contender.case.adapter_dtype else None
            )
            record.dropout_on = (
                contender.case.form.dropout_on if contender.case.form.magnitude else None
            )
            record.route = contender.route
            row.judge(record, *verifier.worst(contender))
            if contender.stand_in:
                values, contender = contender.parameters, self._build(key, tensors)
                contender.load(values)  # as everybody else's: a B of zeros may run faster
            self._count(contender, record, tensors)
            self.contenders[key] = contender
        except Exception as error:
            self._failed(key, error)

    def _count(
        self, contender: Contender, record: Record, tensors: dict[str, torch.Tensor]
    ) -> None:
        x, dy, device = tensors["x"].detach().requires_grad_(), tensors["dy"], self.problem.device
        step = _step(contender, x, dy)
        step(lambda: None)  # compiles, and makes what is made once
        contender.clear()
        x.grad = None
        named, constant = {"x": x}, [*contender.layer.parameters(), *contender.layer.buffers()]
        kept = testing.saved(lambda: contender.module(x), named, constant)
        sizes = {"x": x.numel() * x.itemsize, "y": dy.numel() * dy.itemsize}
        record.saved_bytes, record.saved_by_reference = (
            kept.own,
            {name: sizes[name] for name in sorted(kept.referenced)},
        )
        record.activation_bytes = memory.measured(lambda: contender.module(x), device).held
        record.peak_bytes = memory.measured(lambda: step(lambda: None), device).peak
        contender.clear()

    def _time(self, tensors: dict[str, torch.Tensor]) -> None:
        p, plan = self.problem, self.plan
        self.progress.begin(f"{p}: rounds")
        # A wrong row shows no speed; it is not timed either.
        able = {
            key: one for key, one in self.contenders.items() if self.records[key].status == "ok"
        }
        steps = {
            key: _step(one, tensors["x"].detach().requires_grad_(), tensors["dy"])
            for key, one in able.items()
        }
        samples = interleave(
            steps,
            Clock(p.device),
            plan.rounds,
            plan.warmup,
            self._failed,
            plan.seconds,
            row.LEAST_ROUNDS,
        )
        frozen, copied = (
            samples.get(FROZEN_KEY),
            bandwidth.measured(p.device, p.dtype.itemsize * p.M * max(p.K, p.N)),
        )
        for key, phases in samples.items():
            row.enter_times(self.records[key], phases, frozen, plan.warmup)
            if key[0].adapts:
                least = floor(
                    able[key].case,
                    "lora_A" in able[key].trained,
                    p.device.type,
                    self.records[FROZEN_KEY].step_ms,
                    copied,
                )
                row.enter_floor(self.records[key], least, copied)

    def _failed(self, key: tuple[Impl, str], error: Exception) -> None:
        row.fail(self.records[key], error, key[0])
        self.contenders.pop(key, None)
        row.release(self.problem.device)


def _step(contender: Contender, x: torch.Tensor, dy: torch.Tensor) -> Step:
    def step(mark: Mark) -> None:
        x.grad = None
        contender.clear()
        mark()
        y = contender.module(x)
        mark()
        y.backward(dy)
        mark()

    return step


def _draws(p: Problem) -> int:
    """How many random problems an error is taken over: the fewer elements one has, the more."""
    return 1 if p.M * p.K > 1 << 20 else 2 if p.M * p.K > 1 << 17 else 4
