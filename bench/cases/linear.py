"""lorafast-bench linear: one layer, every implementation next to the frozen layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from lorafast import testing
from lorafast.bench.cases import implementations, recipes
from lorafast.bench.cases.candidate import Candidate, Problem, build
from lorafast.bench.cases.implementations import FROZEN_KEY, Impl
from lorafast.bench.cases.rounds import Key, time_rows, training_step
from lorafast.bench.measure import bandwidth, compiled, memory
from lorafast.bench.measure.correctness import Verifier
from lorafast.bench.measure.lower_bound import lower_bound
from lorafast.bench.measure.timing import Mark, Step
from lorafast.bench.report import fill_record
from lorafast.bench.report.progress import Progress
from lorafast.bench.report.record import Record
from lorafast.testing import SHORT, Case, Form


class Plan(NamedTuple):
    """What to measure: every method by every implementation on every problem.

    seconds: the limit of the rounds of one problem.
    """

    problems: tuple[Problem, ...]
    impls: tuple[Impl, ...]
    methods: tuple[str, ...]
    dropout_on: str
    rounds: int
    seconds: float
    warmup: int
    seed: int

    @property
    def candidates(self) -> tuple[Key, ...]:
        """Implementation and method of every row of one problem."""
        return implementations.candidates(self.impls, self.methods)


def run(plan: Plan, progress: Progress) -> Iterator[list[Record]]:
    """Yield the rows of one problem after another."""
    with compiled.strict(any(impl.compile for impl in plan.impls)):
        for problem in plan.problems:
            yield _ProblemRun(plan, problem, progress).measure()


def progress_total(plan: Plan) -> int:
    """Return how often a run calls progress.begin."""
    return len(plan.problems) * (len(plan.candidates) + 1)


class _ProblemRun:
    """All candidates of one problem."""

    def __init__(self, plan: Plan, problem: Problem, progress: Progress) -> None:
        self.plan, self.problem, self.progress = plan, problem, progress
        self.records = {key: self._record(*key) for key in plan.candidates}
        self.candidates: dict[Key, Candidate] = {}

    def measure(self) -> list[Record]:
        p, plan = self.problem, self.plan
        try:
            case = Case(Form("frozen"), p.M, p.N, p.K, p.R, p.dtype, bias=p.bias)
            made = testing.make(case, plan.seed, p.device, sliced=False)
            tensors = {name: made[name] for name in ("x", "dy", "weight", "bias")}
        except Exception as error:
            for key in self.records:
                self._failed(key, error)
            return list(self.records.values())
        verifier = Verifier(tuple(range(plan.seed, plan.seed + _draws(p))), p.device)
        for key in self.records:
            self.progress.begin(f"{p}: {self.records[key].label}")
            self._examine(key, verifier, tensors)
        del verifier
        fill_record.free_memory(p.device)
        self._time(tensors)
        return list(self.records.values())

    def _record(self, impl: Impl, method: str) -> Record:
        p = self.problem
        return Record(
            "linear",
            str(impl),
            method,
            str(p.device),
            SHORT[p.dtype],
            self.plan.seed,
            p.M,
            p.R,
            p.dropout,
            p.N,
            p.K,
            p.bias,
            compile=impl.compile,
            inference=p.inference,
        )

    def _build(
        self, key: Key, tensors: dict[str, torch.Tensor], for_checking: bool = False
    ) -> Candidate:
        (impl, method), p = key, self.problem
        adapter = None
        if impl.has_adapter:
            # The initial factors are overwritten by the problem's values. A residual init would be
            # subtracted from the weight that all candidates share.
            fields = {"init": "zero"} if method == "lamda" else {}
            adapter = recipes.spec(method, p.R, p.dropout, self.plan.dropout_on, **fields)
        weight, bias = tensors["weight"], tensors["bias"]
        return build(impl, method, adapter, p, weight, bias, for_checking)

    def _examine(self, key: Key, verifier: Verifier, tensors: dict[str, torch.Tensor]) -> None:
        """Build a candidate, check it and count its bytes. A failure affects its row alone."""
        record = self.records[key]
        try:
            if key[0].compile:
                compiled.reset()
            candidate = self._build(key, tensors, for_checking=True)
            case = candidate.case
            record.adapter_dtype = SHORT[case.adapter_dtype] if case.adapter_dtype else None
            record.dropout_on = case.form.dropout_on if case.form.magnitude else None
            record.route = candidate.route
            fill_record.set_error_ratio(record, *verifier.worst(candidate))
            if candidate.for_checking:
                values, candidate = candidate.parameters, self._build(key, tensors)
                # The same values for all candidates: a lora_B of zeros may run faster.
                candidate.load(values)
            self._count_bytes(candidate, record, tensors)
            self.candidates[key] = candidate
        except Exception as error:
            self._failed(key, error)

    def _count_bytes(
        self, candidate: Candidate, record: Record, tensors: dict[str, torch.Tensor]
    ) -> None:
        x, dy, device = self._input(tensors), tensors["dy"], self.problem.device
        step = self._step(candidate, x, dy)
        step(lambda: None)  # compiles, and allocates what is allocated once
        candidate.clear_grads()
        x.grad = None
        constant = [*candidate.layer.parameters(), *candidate.layer.buffers()]
        sizes = {"x": x.numel() * x.itemsize, "y": dy.numel() * dy.itemsize}
        with torch.set_grad_enabled(not self.problem.inference):
            saved = testing.saved(lambda: candidate.module(x), {"x": x}, constant)
            record.activation_bytes = memory.measure(lambda: candidate.module(x), device).held
        record.saved_bytes = saved.own
        record.saved_by_reference = {name: sizes[name] for name in sorted(saved.referenced)}
        record.peak_bytes = memory.measure(lambda: step(lambda: None), device).peak
        candidate.clear_grads()

    def _time(self, tensors: dict[str, torch.Tensor]) -> None:
        p, plan = self.problem, self.plan
        self.progress.begin(f"{p}: rounds")
        # A wrong row shows no speed, so it is not timed.
        timed = {key: one for key, one in self.candidates.items() if self.records[key].ok}
        steps = {
            key: self._step(one, self._input(tensors), tensors["dy"]) for key, one in timed.items()
        }
        samples = time_rows(self.records, steps, plan, p.device, self._failed, self.progress)
        if not p.inference:
            self._set_lower_bounds([timed[key] for key in samples if key[0].has_adapter])

    def _input(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        return tensors["x"].detach().requires_grad_(not self.problem.inference)

    def _step(self, candidate: Candidate, x: torch.Tensor, dy: torch.Tensor) -> Step:
        if self.problem.inference:
            return _forward(candidate, x)
        return _step(candidate, x, dy)

    def _set_lower_bounds(self, timed: list[Candidate]) -> None:
        p, frozen_ms = self.problem, self.records[FROZEN_KEY].step_ms
        rate = bandwidth.copy_bandwidth(p.device, p.dtype.itemsize * p.M * max(p.K, p.N))
        for candidate in timed:
            trains_A = "lora_A" in candidate.trained
            bound = lower_bound(candidate.case, trains_A, p.device.type, frozen_ms, rate)
            record = self.records[candidate.impl, candidate.method]
            fill_record.set_lower_bound(record, bound, rate)

    def _failed(self, key: Key, error: Exception) -> None:
        fill_record.set_failure(self.records[key], error, key[0])
        self.candidates.pop(key, None)
        fill_record.free_memory(self.problem.device)


def _step(candidate: Candidate, x: torch.Tensor, dy: torch.Tensor) -> Step:
    return training_step(candidate.module, x, dy, candidate.clear_grads)


def _forward(candidate: Candidate, x: torch.Tensor) -> Step:
    """Return a step of one phase: forward without gradients."""

    def step(mark: Mark) -> None:
        with torch.no_grad():
            mark()
            candidate.module(x)
            mark()

    return step


def _draws(p: Problem) -> int:
    """Return how many random problems an error is taken over: more for smaller problems."""
    if p.M * p.K > 1 << 20:
        return 1
    # The errors of one token are few independent ones: those of h are in every row of a gradient.
    if p.M <= 8 and p.N * p.K <= 1 << 20:
        return 32
    return 2 if p.M * p.K > 1 << 17 else 4
