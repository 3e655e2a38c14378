"""lorafast-bench experts: a layer of experts, every implementation next to the frozen one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import lorafast
from lorafast import testing
from lorafast.bench.cases import implementations, recipes
from lorafast.bench.cases.candidate import ARGUMENTS
from lorafast.bench.cases.expected_grads import TRAINED
from lorafast.bench.cases.implementations import Impl
from lorafast.bench.cases.rounds import Key, time_rows, training_step
from lorafast.bench.errors import Unavailable
from lorafast.bench.measure import memory
from lorafast.bench.measure.correctness import first_seed
from lorafast.bench.measure.timing import Step
from lorafast.bench.report import fill_record
from lorafast.bench.report.progress import Progress
from lorafast.bench.report.record import Record
from lorafast.testing import SHORT, Case, ExpertsCase, Form, Yardstick

# Errors are taken over at most so many experts and rows, so that float64 fits in memory.
_CHECKED_EXPERTS, _CHECKED_ROWS = 8, 512
_FORMS = {form.name: form for form in testing.FORMS}


class Problem(NamedTuple):
    """A layer of E experts with M tokens, each of which top_k experts get.

    routing: "balanced": every expert has as many rows; "skewed": an expert has four fifths of the
    rows of the one before it; "empty": a quarter of the experts have all rows.
    """

    K: int
    N: int
    R: int
    M: int
    experts: int
    top_k: int
    routing: str
    dropout: float
    dtype: torch.dtype
    device: torch.device

    def __str__(self) -> str:
        size = f"{self.experts} experts of {self.K}x{self.N} R={self.R} M={self.M}"
        return f"{size} {self.routing} p={self.dropout:g} {SHORT[self.dtype]}"

    @property
    def counts(self) -> tuple[int, ...]:
        """The rows of each expert."""
        E, S = self.experts, self.M * self.top_k
        shares = {
            "balanced": [1.0] * E,
            "skewed": [0.8**e for e in range(E)],
            "empty": [float(e % 4 == 0) for e in range(E)],
        }[self.routing]
        ends = torch.tensor(shares, dtype=torch.float64).cumsum(0)
        bounds = (ends / ends[-1] * S).round().long().tolist()
        return tuple(b - a for a, b in zip([0, *bounds[:-1]], bounds, strict=True))

    def checked(self) -> Problem:
        """A smaller problem, over which errors are taken."""
        rows = min(self.M, _CHECKED_ROWS // self.top_k)
        return self._replace(experts=min(self.experts, _CHECKED_EXPERTS), M=max(1, rows))


class Plan(NamedTuple):
    """What to measure: every method by every implementation on every problem.

    seconds: the limit of the rounds of one problem.
    """

    problems: tuple[Problem, ...]
    impls: tuple[Impl, ...]
    methods: tuple[str, ...]
    rounds: int
    seconds: float
    warmup: int
    seed: int

    @property
    def candidates(self) -> tuple[Key, ...]:
        """Implementation and method of every row of one problem."""
        return implementations.candidates(self.impls, self.methods)


class FrozenExperts(nn.Module):
    """The frozen layer: torch's grouped product."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(
        self, x: torch.Tensor, offsets: torch.Tensor, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        return F.grouped_mm(x, self.weight.transpose(1, 2), offs=offsets[1:])


class Candidate(NamedTuple):
    """A layer to check and to measure, called with (x, offsets, rows).

    parameters: each parameter, by its name in lorafast.grouped_linear. as_truth: of each that is
    laid out in another way, a function that views a tensor of its shape as the truth's.
    """

    layer: nn.Module
    form: Form
    parameters: dict[str, torch.Tensor]
    as_truth: dict[str, Callable[[torch.Tensor], torch.Tensor]]
    trained: tuple[str, ...]
    route: str

    @torch.no_grad()
    def load(self, tensors: dict[str, torch.Tensor | None]) -> None:
        """Copy these values into the parameters."""
        for name, parameter in self.parameters.items():
            self.seen(name, parameter).copy_(tensors[name])

    def seen(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A parameter or its gradient as the truth has it."""
        return self.as_truth.get(name, lambda same: same)(tensor)

    def clear_grads(self) -> None:
        """Set every gradient to None."""
        for parameter in self.parameters.values():
            parameter.grad = None


def run(plan: Plan, progress: Progress) -> Iterator[list[Record]]:
    """Yield the rows of one problem after another."""
    for problem in plan.problems:
        yield _ProblemRun(plan, problem, progress).measure()


def progress_total(plan: Plan) -> int:
    """Return how often a run calls progress.begin."""
    return len(plan.problems) * (len(plan.candidates) + 1)


def build(impl: Impl, method: str, problem: Problem, weight: torch.Tensor) -> Candidate:
    """Return a candidate on a weight [E,N,K]. Raises Unavailable."""
    if not impl.has_adapter:
        if impl.base != "frozen":
            raise Unavailable("unsupported", f"experts has no {impl.base}")
        return Candidate(FrozenExperts(weight), Form("frozen"), {}, {}, ("x",), "torch")
    if impl.compile or impl.base not in ("lorafast", "accelerated", "peft"):
        raise Unavailable("unsupported", f"experts has no {impl}")
    fields = {"init": "zero"} if method == "lamda" else {}
    adapter = recipes.spec(method, problem.R, problem.dropout, **fields)
    if impl.base == "lorafast":
        layer = lorafast.Experts.from_parameter(weight, adapter)
        named = dict(layer.named_parameters())
        parameters = {ARGUMENTS[name]: named[name] for name in ARGUMENTS if name in named}
        as_truth, form = {}, _form(method)
    else:
        layer, parameters, as_truth = _by_peft(impl, method, adapter, weight)
        form = _FORMS["lora"]
    trained = ("x", *(name for name in parameters if name in TRAINED[method]))
    return Candidate(layer, form, parameters, as_truth, trained, impl.base)


def _form(method: str) -> Form:
    # The layer has no bias, so that keep="auto" is the output.
    return _FORMS["dora" if method.startswith("dora") else "lamda" if "lamda" in method else "lora"]


def _by_peft(impl: Impl, method: str, adapter, weight: torch.Tensor) -> tuple:
    """A PEFT layer on the weight, its parameters, and how the truth lays them out."""
    import peft

    if method not in ("lora", "dora"):
        raise Unavailable("missing", f"PEFT has no {method} on a parameter")
    E, R, model = weight.shape[0], adapter.r, nn.Module()
    model.experts = FrozenExperts(weight)
    config = peft.LoraConfig(
        r=R, lora_alpha=adapter.alpha, lora_dropout=adapter.dropout, use_dora=method == "dora",
        target_parameters=["experts.weight"],
    )  # fmt: skip
    try:
        made = peft.get_peft_model(model, config)
    except ValueError as error:
        raise Unavailable("unsupported", str(error)) from error
    layer = made.base_model.model.experts
    if impl.base == "accelerated":
        # A report says what accelerate warns of.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            report = lorafast.accelerate(made)
        if report.left:
            raise Unavailable("unsupported", next(iter(report.left.values())))
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    # PEFT packs lora_A as [E·R,K], the expert slowest, and lora_B as [N,R·E], the expert fastest.
    as_truth = {
        "lora_A": lambda A: A.view(E, R, -1),
        "lora_B": lambda B: B.view(B.shape[0], R, E).permute(2, 0, 1),
    }
    return layer, {"lora_A": A, "lora_B": B}, as_truth


class _ProblemRun:
    """All candidates of one problem."""

    def __init__(self, plan: Plan, problem: Problem, progress: Progress) -> None:
        self.plan, self.problem, self.progress = plan, problem, progress
        self.records = {key: self._record(*key) for key in plan.candidates}

    def measure(self) -> list[Record]:
        p, candidates = self.problem, {}
        generator = torch.Generator(p.device).manual_seed(self.plan.seed)
        shape = (p.experts, p.N, p.K)
        weight = torch.empty(shape, dtype=p.dtype, device=p.device)
        weight.normal_(0, p.K**-0.5, generator=generator)
        case = ExpertsCase(self._case(p, Form("frozen")), p.counts)
        x, dy = (
            torch.randn(case.S, width, generator=generator, device=p.device).to(p.dtype)
            for width in (p.K, p.N)
        )
        given = x, case.offsets.to(p.device), case.rows.to(p.device), dy
        for key, record in self.records.items():
            self.progress.begin(f"{p}: {record.label}")
            try:
                self._check(key)
                candidates[key] = self._examined(key, weight, given)
            except Exception as error:
                self._failed(key, error)
        self._time(candidates, given)
        return list(self.records.values())

    def _record(self, impl: Impl, method: str) -> Record:
        p = self.problem
        return Record(
            "experts", str(impl), method, str(p.device), SHORT[p.dtype], self.plan.seed, p.M, p.R,
            p.dropout, p.N, p.K, False, experts=p.experts, top_k=p.top_k, routing=p.routing,
        )  # fmt: skip

    def _case(self, p: Problem, form: Form, factor_dtype: torch.dtype | None = None) -> Case:
        return Case(
            form, 0, p.N, p.K, p.R, p.dtype, p.dropout, bias=False, scaling=2.0,
            adapter_dtype=factor_dtype,
        )  # fmt: skip

    def _check(self, key: Key) -> None:
        """Enter a candidate's error on a smaller problem, and leave out one that is wrong."""
        p, record, seed = self.problem.checked(), self.records[key], self.plan.seed
        weight = torch.zeros(p.experts, p.N, p.K, dtype=p.dtype, device=p.device)
        candidate = build(*key, p, weight)
        dtypes = {parameter.dtype for parameter in candidate.parameters.values()}
        factor_dtype = next(iter(dtypes), None)
        record.adapter_dtype = SHORT[factor_dtype] if factor_dtype else None
        record.route = candidate.route
        case = ExpertsCase(self._case(p, candidate.form, factor_dtype), p.counts)
        tensors = testing.make_experts(case, seed, sliced=False)
        tensors = {name: t if t is None else t.to(p.device) for name, t in tensors.items()}
        if p.dropout:
            tensors["seed"] = first_seed(seed, p.device)
        with torch.no_grad():
            weight.copy_(tensors["weight"])
        yardstick = Yardstick(case, [tensors], _truth(key[0]), candidate.trained)
        ratios = yardstick.ratios(lambda t: self._outputs_and_grads(candidate, case, t))
        name = max(ratios, key=ratios.get)
        fill_record.set_error_ratio(record, ratios[name], name, p.M)

    def _outputs_and_grads(
        self, candidate: Candidate, case: ExpertsCase, tensors: dict[str, torch.Tensor | None]
    ) -> dict[str, torch.Tensor]:
        candidate.load(tensors)
        x = tensors["x"].detach().requires_grad_()
        candidate.clear_grads()
        torch.manual_seed(self.plan.seed)
        device = x.device
        y = candidate.layer(x, case.offsets.to(device), case.rows.to(device))
        y.backward(tensors["dy"])
        grads = {
            name: candidate.seen(name, candidate.parameters[name].grad)
            for name in candidate.trained
            if name != "x"
        }
        return {"y": y.detach(), "x": x.grad} | grads

    def _examined(self, key: Key, weight: torch.Tensor, given: tuple) -> Candidate:
        """A candidate on the whole problem, its bytes entered."""
        record, p = self.records[key], self.problem
        candidate = build(*key, p, weight)
        with torch.no_grad():
            for name, parameter in candidate.parameters.items():
                # A lora_B of zeros may run faster.
                if name in ("lora_B", "core"):
                    parameter.normal_(0, 0.02)
        x, offsets, rows, dy = given
        x = x.detach().requires_grad_()
        step = _step(candidate, x, offsets, rows, dy)
        step(lambda: None)
        sizes = {"x": x.numel() * x.itemsize, "y": dy.numel() * dy.itemsize}
        constant = [*candidate.layer.parameters(), offsets, rows]
        call = lambda: candidate.layer(x, offsets, rows)  # noqa: E731
        saved = testing.saved(call, {"x": x}, constant)
        record.activation_bytes = memory.measure(call, p.device).held
        record.saved_bytes = saved.own
        record.saved_by_reference = {name: sizes[name] for name in sorted(saved.referenced)}
        record.peak_bytes = memory.measure(lambda: step(lambda: None), p.device).peak
        candidate.clear_grads()
        return candidate

    def _time(self, candidates: dict[Key, Candidate], given: tuple) -> None:
        plan, (x, offsets, rows, dy) = self.plan, given
        self.progress.begin(f"{self.problem}: rounds")
        steps = {
            key: _step(one, x.detach().requires_grad_(), offsets, rows, dy)
            for key, one in candidates.items()
            if self.records[key].ok
        }
        time_rows(self.records, steps, plan, self.problem.device, self._failed, self.progress)

    def _failed(self, key: Key, error: Exception) -> None:
        fill_record.set_failure(self.records[key], error, key[0])
        fill_record.free_memory(self.problem.device)


def _truth(impl: Impl) -> Callable:
    """The formula of an implementation's rows, by the eager chain."""
    if impl.has_adapter:
        return testing.chain_experts

    def frozen(case: ExpertsCase, t: dict, factor_dtype: torch.dtype | None = None) -> torch.Tensor:
        bounds = case.offsets.tolist()
        pairs = zip(bounds[:-1], bounds[1:], t["weight"], strict=True)
        return torch.cat([F.linear(t["x"][a:b], weight) for a, b, weight in pairs])

    return frozen


def _step(
    candidate: Candidate,
    x: torch.Tensor,
    offsets: torch.Tensor,
    rows: torch.Tensor,
    dy: torch.Tensor,
) -> Step:
    def call(x: torch.Tensor) -> torch.Tensor:
        return candidate.layer(x, offsets, rows)

    return training_step(call, x, dy, candidate.clear_grads)


def problems(
    sizes: Iterator[tuple], dtype: torch.dtype, device: torch.device, top_k: int
) -> tuple[Problem, ...]:
    """Return the problems of (shape, rank, experts, routing, dropout, tokens)."""
    return tuple(
        Problem(shape.K, shape.N, R, M, E, top_k, routing, p, dtype, device)
        for shape, R, E, routing, p, M in sizes
    )
