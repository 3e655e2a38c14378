"""lorafast-bench estimate: the memory of a training step, counted on tensors without values."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch

from lorafast.bench.cases import cards, estimated_model, implementations
from lorafast.bench.cases.cards import CARDS
from lorafast.bench.cases.choices import DENSE, ESTIMATED_BASES
from lorafast.bench.cases.estimated_model import Batch, EstimatedModel
from lorafast.bench.cases.implementations import Impl
from lorafast.bench.cases.model_presets import Preset
from lorafast.bench.errors import BenchError
from lorafast.bench.measure.fused_ops import fused_ops
from lorafast.bench.measure.live_memory import LiveMemory, storage_bytes
from lorafast.bench.report import fill_record
from lorafast.bench.report.progress import Progress
from lorafast.bench.report.record import Record
from lorafast.engine import step_model
from lorafast.engine.backends import eager
from lorafast.engine.kernels import gpu_specs
from lorafast.engine.kernels.modelled import Machine, Work
from lorafast.engine.problem import PRIMITIVES
from lorafast.runtime import devices
from lorafast.runtime.devices import Arch, StandIn
from lorafast.testing import SHORT, allocated

# The most texts in a batch that are looked for.
MOST_TEXTS = 1 << 20
# The name of the device in the facts of a file.
NO_DEVICE = "no device: estimated"
_META = torch.device("meta")


class Plan(NamedTuple):
    """What to estimate: every implementation of every method, by batch size.

    card: one of CARDS, or "cpu". reserve: bytes of the card that a step cannot have. measure: take
    the steps really too, on this machine's CPU.
    """

    name: str
    preset: Preset
    impls: tuple[Impl, ...]
    methods: tuple[str, ...]
    batch_sizes: tuple[int, ...]
    seq: int
    target: int
    card: str
    dtype: torch.dtype
    R: int
    dropout: float
    checkpointing: tuple[bool, ...]
    base_formats: tuple[str, ...]
    reserve: int
    measure: bool = False

    @property
    def keys(self) -> tuple[tuple[Impl, str], ...]:
        """Implementation and method of every row of one batch size."""
        return implementations.candidates(self.impls, self.methods)


class Step(NamedTuple):
    """The bytes of one training step, and its modelled seconds.

    activations: alive at the end of forward. head: those of them that the head and the loss made.
    peak: the most alive at once, besides weights and the optimizer's state.
    """

    activations: int
    head: int | None
    peak: int
    seconds: float | None


def progress_total(plan: Plan) -> int:
    """Return how often a run calls progress.begin."""
    return len(plan.keys) * len(plan.checkpointing)


def run(plan: Plan, progress: Progress) -> Iterator[list[Record]]:
    """Yield the rows of every implementation, with checkpointing off and on."""
    linears = None
    for impl, method in plan.keys:
        estimate, failure = None, None
        for on in plan.checkpointing:
            label = str(impl) if method == implementations.NO_METHOD else f"{impl} {method}"
            progress.begin(f"{plan.name}: {label}{', checkpointing' if on else ''}")
            try:
                if linears is None:
                    linears = _linears(plan)
                estimate = estimate or _Estimate(plan, impl, method)
                yield _rows(plan, impl, method, on, estimate, linears)
            except BenchError:  # of the config, and so of every row
                raise
            except Exception as error:
                if failure is None:  # one row says it for both
                    failure = _record(plan, impl, method, plan.batch_sizes[0], on)
                    fill_record.set_failure(failure, error, impl)
                    yield [failure]


def _linears(plan: Plan) -> dict[str, int]:
    base = estimated_model.base_model(plan.preset, plan.dtype, _META).requires_grad_(False)
    return estimated_model.linear_weight_bytes(base)


def _rows(
    plan: Plan,
    impl: Impl,
    method: str,
    checkpointing: bool,
    estimate: _Estimate,
    linears: dict[str, int],
) -> list[Record]:
    """Return a row for every base format and batch size."""
    rows = []
    for base_format in plan.base_formats:
        base = _base(base_format, impl, linears)
        largest = None
        if base is not None and (memory := card_memory(plan)):
            room = memory + base.saved - base.workspace
            largest = estimate.largest_batch(checkpointing, room)
        for size in plan.batch_sizes:
            record = _record(plan, impl, method, size, checkpointing, base_format)
            if base is None:
                rows.append(record.fail("unsupported", "a quantised weight does not train"))
                continue
            estimate.fill(record, checkpointing, base)
            record.weight_formats = {
                name: record.weight_bytes + base.saved - linears["dense"] + linears[name]
                for name in ESTIMATED_BASES
            }
            record.largest_batch = largest
            rows.append(record)
    if plan.measure:
        for record in rows:
            if record.ok and record.base_format == DENSE:
                record.measured_peak_bytes = measured(plan, impl, method, record)
    return rows


class _Base(NamedTuple):
    """What a base format changes: bytes of weights that it saves, of workspace that it needs."""

    saved: int
    workspace: int


_DENSE = _Base(0, 0)


def _base(base_format: str, impl: Impl, linears: dict[str, int]) -> _Base | None:
    """Return what a base format changes; None if the weights train, which no quantised one does.

    A quantised base has one dequantised weight at a time.
    """
    if base_format == DENSE:
        return _DENSE
    if impl.base == "full":
        return None
    return _Base(linears["dense"] - linears[base_format], linears["largest"])


def card_memory(plan: Plan) -> int | None:
    """Return the bytes of the card that a step may take; None for the CPU."""
    return CARDS[plan.card].memory_bytes - plan.reserve if plan.card in CARDS else None


def _record(
    plan: Plan,
    impl: Impl,
    method: str,
    size: int,
    checkpointing: bool,
    base_format: str = DENSE,
) -> Record:
    return Record(
        "estimate",
        str(impl),
        method,
        plan.card,
        SHORT[plan.dtype],
        0,
        size * plan.seq,
        plan.R,
        plan.dropout,
        checkpointing=checkpointing,
        model=plan.name,
        batch_size=size,
        seq=plan.seq,
        optimizer="AdamW",
        route="modelled",
        base_format=base_format,
        card_bytes=card_memory(plan),
    )


class _Estimate:
    """One implementation on meta tensors, and the steps that were counted with it."""

    def __init__(self, plan: Plan, impl: Impl, method: str) -> None:
        self.plan = plan
        self.on_gpu = plan.card in CARDS
        self.machine = machine_of(plan.card)
        self.built = estimated_model.build(
            plan.preset, impl, method, plan.R, plan.dropout, plan.dtype, _META, self.on_gpu
        )
        self.step = functools.cache(self._step)
        # Makes the optimizer's state, which is there before any other step.
        self._step(1, False)
        self.weights = storage_bytes([*self.built.model.parameters(), *self.built.model.buffers()])
        self.state = storage_bytes(self.built.state())

    def fill(self, record: Record, checkpointing: bool, base: _Base = _DENSE) -> None:
        """Enter what a step takes on a base."""
        step = self.step(record.batch_size, checkpointing)
        record.trainable = sum(p.numel() for p in self.built.trained)
        record.grad_bytes = sum(p.numel() * p.itemsize for p in self.built.trained)
        record.optimizer_bytes = self.state
        record.weight_bytes = self.weights - base.saved
        record.activation_bytes, record.head_bytes = step.activations, step.head
        record.peak_bytes = step.peak + base.workspace
        record.total_bytes = record.weight_bytes + self.state + record.peak_bytes
        record.modelled_ms = None if step.seconds is None else step.seconds * 1e3

    def largest_batch(self, checkpointing: bool, memory: int) -> int:
        """Return the most texts whose step fits, 0 if not even one does.

        The peak is the largest of sums that are nearly affine in the batch size. The line through
        two counted steps says where to look, and the answer is a size that was counted and fits,
        beside the next one, which was counted and does not.
        """
        known: dict[int, int] = {}

        def room(size: int) -> int:
            known[size] = memory - self._constant() - self.step(size, checkpointing).peak
            return known[size]

        for size in (1, *self.plan.batch_sizes):
            room(size)
        while True:
            low = max((size for size, left in known.items() if left >= 0), default=0)
            high = min((size for size, left in known.items() if left < 0), default=MOST_TEXTS)
            if high - low <= 1 or low == 0:
                return low
            others = [size for size in known if size != low]
            other = high if high in known else max(others, default=None)
            guess = 2 * low
            if other is not None and known[other] != known[low]:
                slope = (known[low] - known[other]) / (other - low)
                guess = low + int(known[low] / slope) if slope > 0 else guess
            # A guess that is right is confirmed by the size after it.
            room(min(max(guess, low + 1), high - 1))

    def _constant(self) -> int:
        return self.weights + self.state

    def _step(self, size: int, checkpointing: bool) -> Step:
        """Return the bytes of a step at a batch size."""
        plan, built = self.plan, self.built
        built.set_checkpointing(checkpointing)
        batch = Batch(size, plan.seq, plan.target)
        arguments = batch.arguments(plan.preset.task, _META)
        works: list[Work] = []
        with contextlib.ExitStack() as stack:
            trace = stack.enter_context(_as_on(self.machine))
            if trace is not None:
                works = trace.works
            note = functools.partial(_note, works, self.machine)
            stack.enter_context(fused_ops(self.on_gpu, note if self.machine else None))
            live = stack.enter_context(LiveMemory(self.on_gpu))
            live.ignore([*built.held(), *arguments.values()])
            return self._count(live, arguments, trace)

    def _count(
        self,
        live: LiveMemory,
        arguments: dict[str, torch.Tensor],
        trace: step_model.Trace | None,
    ) -> Step:
        forward, before_head = [], []
        head = _head(self.built)
        hook = head and head.register_forward_pre_hook(lambda *_: before_head.append(live.now))
        try:
            self.built.step(arguments, lambda: forward.append(live.now))
        finally:
            if hook is not None:
                hook.remove()
        (activations,) = forward
        # With checkpointing the head is still called once.
        made = activations - before_head[0] if before_head else None
        return Step(activations, made, live.peak, trace.seconds if trace else None)


def _head(built: EstimatedModel) -> torch.nn.Module | None:
    """Return the layer that makes logits of a vocabulary; None if the model has none."""
    found = getattr(built.model, "get_output_embeddings", lambda: None)()
    return found if isinstance(found, torch.nn.Module) else None


def machine_of(card: str) -> Machine | None:
    """Return a card as kernels.modelled knows it; None for the CPU."""
    if card not in CARDS:
        return None
    known = CARDS[card]
    arch = Arch("nvidia", known.arch, known.multiprocessors)
    specs = gpu_specs.device(arch)
    return Machine(arch, specs._replace(bandwidth=known.bandwidth * cards.COPY_SHARE))


def _note(works: list[Work], machine: Machine, name: str, flops: int, moved: int) -> None:
    seconds = max(flops / machine.specs.half_flops, moved / machine.specs.bandwidth)
    works.append(Work(name, moved, seconds))


@contextlib.contextmanager
def _as_on(machine: Machine | None) -> Iterator[step_model.Trace | None]:
    """A context in which lorafast's primitives go the way they go on a device.

    On a GPU that is Triton's kernels for 16 bits, else torch's operations, and the trace takes the
    time of everything; on the CPU torch's operations, which allocate what the C++ kernels do but
    for a workspace of these.
    """
    if machine is None:
        stand_in = StandIn(Arch("cpu", "cpu"), eager, None)
        trace: contextlib.AbstractContextManager = contextlib.nullcontext()
    else:
        trace = step_model.Trace(machine)
        backend = _Served(trace, machine)
        stand_in = StandIn(machine.arch, backend, backend.kernels.drop_into)
    token = devices.stand_in.set(stand_in)
    try:
        with trace as entered:
            yield entered
    finally:
        devices.stand_in.reset(token)


class _Served:
    """Triton's kernels for calls in 16 bits, and torch's operations for all others."""

    def __init__(self, trace: step_model.Trace, machine: Machine) -> None:
        chosen = step_model.Chosen(trace, frozenset((*PRIMITIVES, "drop")), frozenset())
        self.kernels = chosen.kernels

    def __getattr__(self, primitive: str):
        if primitive not in (*PRIMITIVES, "drop"):
            raise AttributeError(primitive)
        by_kernels, by_torch = getattr(self.kernels, primitive), getattr(eager, primitive)

        def call(*args, **kwargs):
            first = args[0][0].dy if isinstance(args[0], list) else args[0]
            halves = first.dtype in step_model.HALVES
            return (by_kernels if halves else by_torch)(*args, **kwargs)

        return call


def measured(plan: Plan, impl: Impl, method: str, record: Record) -> int:
    """Return the peak of the same step taken on this machine's CPU, as the bench measures it."""
    device = torch.device("cpu")
    built = estimated_model.build(
        plan.preset, impl, method, plan.R, plan.dropout, plan.dtype, device, False
    )
    built.set_checkpointing(record.checkpointing)
    arguments = Batch(record.batch_size, plan.seq, plan.target).arguments(plan.preset.task, device)
    built.step(arguments)
    return allocated(lambda: built.step(arguments)).peak
