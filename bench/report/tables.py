"""Tables of rows, the same for the terminal and for the page."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterable
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from lorafast.bench.cases import implementations
from lorafast.bench.report.record import Record, Results


class Table(NamedTuple):
    """A title, column heads, and rows of cells.

    sections: indices of the rows after which a line is drawn.
    notes: what does not fit in a cell.
    """

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    sections: frozenset[int]
    notes: tuple[str, ...]


NOTHING = "–"
# The columns of correctness come before those of speed.
_RATIO = ("err ratio", "× frozen", "95 % interval")
_FLOORS = ("floor", "fused")
_TIMES = ("step ms", "fwd ms", "bwd ms", "tokens/s")
_BYTES = ("saved", "by reference", "activations", "peak")
_LINEAR = ("M", "impl", "method", *_RATIO, *_FLOORS, *_TIMES, *_BYTES)
_STEP = ("batch", "impl", "method", *_RATIO, *_TIMES, *_BYTES)
_LOSSES = ("loss: first 10", "last 10", "held-out accuracy")
_TRAINED = ("trained params", "optimizer", "optimizer state", "peak")
_TRAINING = ("impl", "method", "err ratio", *_LOSSES, "× frozen", "step ms", "lr", *_TRAINED)
# The columns of words, which are aligned to the left.
WORDS = ("impl", "method", "optimizer")
# Statuses of rows that cannot be measured. They are notes, not rows of dashes.
_NOT_SHOWN = ("missing", "unsupported")

LEGEND = (
    "err ratio: RMS error against float64 ÷ the eager chain's, the worst over y and every "
    "gradient; above 2 a row is wrong and shows no speed. Of a model: over the logits and each "
    "kind of gradient, for 16 texts, with random adapter parameters and dropout.",
    "× frozen: time of a step ÷ the frozen one's of the same round, median, and the 95 % interval "
    "of that median. A step is forward, and backward with dx; of a model, the optimizer's step "
    "too, and its frozen row trains the head alone.",
    "floor, fused: computed lower bounds of × frozen, not measured. fused: the flops added to the "
    "frozen products, at their rate; floor: each added pass over x, y and W next to those "
    "products, at a copy's bandwidth where that takes longer.",
    "saved: bytes autograd keeps besides x, y and weights (of a model: besides weights); "
    "by reference: x or y, if autograd keeps it.",
    "activations: bytes alive at the end of forward, y included; peak: the most alive at once in a "
    "step, besides weights, inputs and optimizer state; optimizer state: the optimizer's state "
    "dict, without a schedule's state. (both): DoRA whose dropout applies to the correction of the "
    "base term too, as in PEFT.",
)


def tables(results: Iterable[Results]) -> list[Table]:
    """Return a table for each kind of problem of each file, rows in the order of measurement."""
    makers = {"linear": _linear, "step": _step, "training": _training}
    found, titles = [], set()
    for one in results:
        kinds: dict[tuple, list[Record]] = {}
        for record in one.records:
            kinds.setdefault(_kind(record), []).append(record)
        where = one.env.get("device_name", "")
        for kind, rows in kinds.items():
            table = makers[kind[0]](rows)
            title = f"{table.title}, on {where}"
            if rows[0].run:
                title += f" ({rows[0].run})"
            elif title in titles:
                # The same problem measured twice, before and after a change for example.
                title += f" ({one.env.get('commit')}, {one.env.get('time')})"
            titles.add(title)
            found.append(table._replace(title=title))
    return found


def show(found: list[Table], console: Console, legend: tuple[str, ...] = LEGEND) -> None:
    """Print tables. One wider than the console is split; each part has the columns of names."""
    for table in found:
        for heads, space in _parts(table, console):
            console.print(_drawn(table, heads, space))
        for note in table.notes:
            console.print(Text(note, style="dim"))
    if found:
        console.print(Text("\n".join(legend), style="dim"))


def _parts(table: Table, console: Console) -> list[tuple[tuple[str, ...], int]]:
    """Return groups of columns that fit the console, and the space between columns."""
    unbounded = console.options.update(width=1000)

    def fits(heads: tuple[str, ...], space: int) -> bool:
        drawn = _drawn(table, heads, space)
        return console.measure(drawn, options=unbounded).maximum <= console.width

    if fits(table.heads, 2):
        return [(table.heads, 2)]
    # The columns that name a row: those up to the method, or the first one in tune's tables.
    names = table.heads.index("method") + 1 if "method" in table.heads else 1
    parts = [table.heads[: names + 1]]
    for head in table.heads[names + 1 :]:
        if fits((*parts[-1], head), 1):
            parts[-1] = (*parts[-1], head)
        else:
            parts.append((*table.heads[:names], head))
    return [(part, 1) for part in parts]


def _drawn(table: Table, heads: tuple[str, ...], space: int) -> RichTable:
    drawn = RichTable(
        title=Text(table.title, style="bold"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, space, 0, 0),
    )
    for head in heads:
        drawn.add_column(Text(head), justify="left" if head in WORDS else "right", no_wrap=True)
    for index, row in enumerate(table.rows):
        cells = dict(zip(table.heads, row, strict=True))
        drawn.add_row(*(Text(cells[head]) for head in heads), end_section=index in table.sections)
    return drawn


def _kind(r: Record) -> tuple:
    """Return what the rows of one table have in common."""
    if r.bench == "linear":
        return "linear", r.K, r.N, r.R, r.dtype, r.dropout, r.bias, r.run
    batch_size = r.batch_size if r.bench == "training" else None
    return r.bench, r.model, r.seq, r.R, r.dtype, r.dropout, batch_size, r.run


def _linear(rows: list[Record]) -> Table:
    r = rows[0]
    title = f"one layer {r.K} → {r.N}, R={r.R}, {r.dtype}, dropout {r.dropout:g}"
    if r.bias:
        title += ", bias"

    def cells(r: Record) -> tuple[str, ...]:
        floors = (number(r.floor, ".2f"), number(r.fused_floor, ".2f"))
        return str(r.M), r.impl, _method(r), *_ratio(r), *floors, *_times(r), *_bytes(r)

    return _table(title, _LINEAR, rows, cells, lambda r: r.M)


def _step(rows: list[Record]) -> Table:
    r = rows[0]
    title = f"{r.model}, one step by batch size, {r.seq} tokens each, R={r.R}, {r.dtype}"
    title += f", dropout {r.dropout:g}"

    def cells(r: Record) -> tuple[str, ...]:
        return str(r.batch_size), r.impl, _method(r), *_ratio(r), *_times(r), *_bytes(r)

    return _table(title, _STEP, rows, cells, lambda r: r.batch_size)


def _training(rows: list[Record]) -> Table:
    r = rows[0]
    steps = max((len(r.losses) for r in rows if r.losses), default=0)
    title = f"{r.model}, {steps} steps of {r.batch_size} × {r.seq} tokens, R={r.R}, {r.dtype}"
    title += f", dropout {r.dropout:g}"

    def cells(r: Record) -> tuple[str, ...]:
        first = last = NOTHING
        if r.losses:
            first, last = (f"{statistics.fmean(p):.3f}" for p in (r.losses[:10], r.losses[-10:]))
        error, ratio, _ = _ratio(r)
        return (
            r.impl,
            _method(r),
            error,
            first,
            last,
            number(r.accuracy, ".3f"),
            ratio,
            _times(r)[0],
            number(r.lr, "g"),
            number(r.trainable, ",d"),
            r.optimizer or NOTHING,
            size(r.optimizer_bytes),
            size(r.peak_bytes),
        )

    table = _table(title, _TRAINING, rows, cells, lambda r: 0)
    return table._replace(notes=(*_loss_gaps(rows), *table.notes))


def _loss_gaps(rows: list[Record]) -> tuple[str, ...]:
    """Return a note on the largest difference between lorafast's loss and PEFT's.

    There is none with dropout or in half precision, where correct implementations differ too.
    """
    if rows[0].dropout or rows[0].dtype != "fp32":
        return ()
    trained = {(r.impl, r.method): r for r in rows if r.ok}
    notes = []
    for (impl, method), ours in trained.items():
        baseline = trained.get(("peft", method))
        if baseline and implementations.parse(impl).uses_lorafast:
            gap, steps = ours.loss_gap(baseline)[0], len(ours.losses)
            notes.append(
                f"{ours.label}: the loss is at most {gap:.2g} from PEFT's at any of {steps} steps"
            )
    return tuple(notes)


def _table(
    title: str,
    heads: tuple[str, ...],
    rows: list[Record],
    cells: Callable[[Record], tuple[str, ...]],
    section: Callable[[Record], int],
) -> Table:
    shown = [r for r in rows if r.status not in _NOT_SHOWN]
    groups = itertools.groupby(shown, key=section)
    ends = itertools.accumulate(len(list(group)) for _, group in groups)
    hidden = [f"{r.label}: {r.status}: {r.reason}" for r in rows if r.status in _NOT_SHOWN]
    failed = []
    for r in shown:
        if not r.ok:
            where = f"M={r.M}" if r.batch_size is None else f"batch {r.batch_size}"
            failed.append(f"{where}, {r.label}: {r.status}: {r.reason}")
    # One note for what cannot be measured at any size.
    notes = dict.fromkeys([*hidden, *failed])
    sections = frozenset(end - 1 for end in ends)
    return Table(title, heads, tuple(cells(r) for r in shown), sections, tuple(notes))


def _method(r: Record) -> str:
    if r.method == "none":
        return ""
    return f"{r.method} (both)" if r.dropout and r.dropout_on == "both" else r.method


def _ratio(r: Record) -> tuple[str, ...]:
    """Return the error ratio, the ratio to frozen and its interval.

    A row that is not ok has its status in the place of the ratio.
    """
    if r.error_ratio is not None:
        error = f"{r.error_ratio:.2f}"
    else:
        error = "not finite" if r.status == "wrong" else NOTHING
    if not r.ok:
        return error, r.status, NOTHING
    interval = NOTHING if r.ratio_low is None else f"{r.ratio_low:.2f}–{r.ratio_high:.2f}"
    return error, number(r.ratio_to_frozen, ".2f"), interval


def _times(r: Record) -> tuple[str, ...]:
    """Return step, forward and backward in ms, and tokens per second."""
    if not r.ok:
        return (NOTHING,) * 4
    times = (
        number(ms, ".3g") if ms is None or ms < 100 else f"{ms:.0f}"
        for ms in (r.step_ms, r.fwd_ms, r.bwd_ms)
    )
    return *times, NOTHING if r.step_ms is None else f"{r.M / (r.step_ms / 1e3):,.0f}"


def _bytes(r: Record) -> tuple[str, ...]:
    """Return saved bytes, what is saved by reference, activations and the peak."""
    kept = NOTHING if r.saved_by_reference is None else "+".join(r.saved_by_reference) or "none"
    return size(r.saved_bytes), kept, size(r.activation_bytes), size(r.peak_bytes)


def number(value: float | None, form: str) -> str:
    """Return a formatted number, or a dash for None."""
    return NOTHING if value is None else format(value, form)


def size(count: int | None) -> str:
    """Return bytes with a suitable unit, or a dash for None."""
    if count is None:
        return NOTHING
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} B"
