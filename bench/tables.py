"""Rows as people read them: the same tables for the terminal and for the report."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterable
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from lorafast.bench import impl as impls
from lorafast.bench.record import Record, Results


class Table(NamedTuple):
    """A title, heads, and rows of cells; notes say what a cell cannot. `sections`: rows after which a rule is drawn."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    sections: frozenset[int]
    notes: tuple[str, ...]


NOTHING = "–"
# Trust stands before speed.
_RATIO = ("err ratio", "× frozen", "its 95 %")
_FLOORS = ("floor", "fused")
_TIMES = ("step ms", "fwd ms", "bwd ms", "tokens/s")
_BYTES = ("saved", "keeps", "activations", "peak")
_LINEAR = ("M", "impl", "method", *_RATIO, *_FLOORS, *_TIMES, *_BYTES)
_STEP = ("batch", "impl", "method", *_RATIO, *_TIMES, *_BYTES)
_TRAINING = (
    *(
        "impl",
        "method",
        "err ratio",
        "loss: first 10",
        "last 10",
        "held-out accuracy",
        "× frozen",
        "step ms",
        "lr",
    ),
    *("trained params", "optimizer", "its state", "peak"),
)
WORDS = ("impl", "method", "optimizer")

LEGEND = (
    "err ratio: RMS error against float64 ÷ the eager chain's, the worst over y and every gradient; above 2 a row is wrong and "
    "shows no speed. Of a model: over the logits and each kind of gradient, for 16 texts, factors random, masks included.",
    "× frozen: time of a step ÷ the frozen one's of the same round, median, and its 95 % interval. A step is forward and backward "
    "with dx; of a model, the optimizer's step too, and its frozen row trains the head alone.",
    "floor, fused: reckoned, not measured: the least × frozen of what the row computes. fused: what it adds to the frozen products "
    "at their flops a second; floor: pass by pass over x, y, W beside those products, at a copy's bytes a second where more.",
    "saved: bytes autograd keeps beyond x, y and weights (of a model: beyond weights); keeps: x or y, by reference.",
    "activations: bytes alive at the end of forward, y included; peak: the most alive at once in a step, beyond weights, inputs "
    "and optimizer state; its state: what the optimizer's state dict holds, a schedule's own left out. (both): DoRA that drops x "
    "in the correction of its base term too, as PEFT does.",
)


def tables(results: Iterable[Results]) -> list[Table]:
    """One table a kind of problem and a file, rows in the order they were measured."""
    makers = {"linear": _linear, "step": _step, "training": _training}
    found, titles = [], []
    for one in results:
        kinds: dict[tuple, list[Record]] = {}
        for record in one.records:
            kinds.setdefault(_kind(record), []).append(record)
        where = one.env.get("device_name", "")
        for kind, rows in kinds.items():
            table = makers[kind[0]](rows)
            title = f"{table.title}, on {where}"
            # Before and after: the same problem measured twice is told apart by what was measured, and when.
            again = f" ({one.env.get('commit')}, {one.env.get('time')})" if title in titles else ""
            titles.append(title)
            found.append(table._replace(title=title + again))
    return found


def show(found: list[Table], console: Console, legend: tuple[str, ...] = LEGEND) -> None:
    """Print them; one that is wider than the console in several, each with the columns that name the row."""
    for table in found:
        for heads, space in _parts(table, console):
            console.print(_drawn(table, heads, space))
        for note in table.notes:
            console.print(Text(note, style="dim"))
    if found:
        console.print(Text("\n".join(legend), style="dim"))


def _parts(table: Table, console: Console) -> list[tuple[tuple[str, ...], int]]:
    """Columns that fit the console together, and the space between them."""
    unbounded = console.options.update(width=1000)

    def fits(heads: tuple[str, ...], space: int) -> bool:
        return (
            console.measure(_drawn(table, heads, space), options=unbounded).maximum <= console.width
        )

    if fits(table.heads, 2):
        return [(table.heads, 2)]
    names = table.heads.index("method") + 1
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
    """What the rows of one table have in common."""
    if r.bench == "linear":
        return "linear", r.K, r.N, r.R, r.dtype, r.dropout, r.bias
    return (
        r.bench,
        r.model,
        r.seq,
        r.R,
        r.dtype,
        r.dropout,
        r.batch_size if r.bench == "training" else None,
    )


def _linear(rows: list[Record]) -> Table:
    r = rows[0]
    title = f"one layer {r.K} → {r.N}, R={r.R}, {r.dtype}, dropout {r.dropout:g}{', bias' if r.bias else ''}"

    def cells(r: Record) -> tuple[str, ...]:
        speed = _speed(r)
        return (
            str(r.M),
            r.impl,
            _method(r),
            *speed[: len(_RATIO)],
            *_floors(r),
            *speed[len(_RATIO) :],
            *_bytes(r),
        )

    return _table(title, _LINEAR, rows, cells, lambda r: r.M)


def _step(rows: list[Record]) -> Table:
    r = rows[0]
    title = f"{r.model}, one step by batch size, {r.seq} tokens each, R={r.R}, {r.dtype}, dropout {r.dropout:g}"

    def cells(r: Record) -> tuple[str, ...]:
        return (str(r.batch_size), r.impl, _method(r), *_speed(r), *_bytes(r))

    return _table(title, _STEP, rows, cells, lambda r: r.batch_size)


def _training(rows: list[Record]) -> Table:
    r = rows[0]
    steps = max((len(r.losses) for r in rows if r.losses), default=0)
    title = f"{r.model}, {steps} steps of {r.batch_size} × {r.seq} tokens, R={r.R}, {r.dtype}, dropout {r.dropout:g}"

    def cells(r: Record) -> tuple[str, ...]:
        first, last = (
            (f"{statistics.fmean(part):.3f}" for part in (r.losses[:10], r.losses[-10:]))
            if r.losses
            else (NOTHING,) * 2
        )
        _, ratio, _, step, *_ = _speed(r)
        return (
            r.impl, _method(r), _error(r), first, last, number(r.accuracy, ".3f"), ratio, step, number(r.lr, "g"),
            number(r.trainable, ",d"), r.optimizer or NOTHING, size(r.optimizer_bytes), size(r.peak_bytes),
        )  # fmt: skip

    table = _table(title, _TRAINING, rows, cells, lambda r: 0)
    return table._replace(notes=(*_apart(rows), *table.notes))


def _apart(rows: list[Record]) -> tuple[str, ...]:
    """How far our loss ever was from PEFT's; with dropout, or in half precision, that says nothing."""
    if rows[0].dropout or rows[0].dtype != "fp32":
        return ()
    trained = {(r.impl, r.method): r for r in rows if r.status == "ok"}
    notes = []
    for (impl, method), ours in trained.items():
        theirs = trained.get(("peft", method)) if impls.parse(impl).ours else None
        if theirs:
            notes.append(
                f"{ours.label}: the loss is at most {ours.loss_gap(theirs)[0]:.2g} from PEFT's at any of {len(ours.losses)} steps"
            )
    return tuple(notes)


def _table(
    title: str,
    heads: tuple[str, ...],
    rows: list[Record],
    cells: Callable,
    section: Callable[[Record], int],
) -> Table:
    # What cannot be measured is one note, not a row of dashes at every size.
    shown = [r for r in rows if r.status not in ("missing", "unsupported")]
    ends = itertools.accumulate(
        len(list(group)) for _, group in itertools.groupby(shown, key=section)
    )
    notes = dict.fromkeys(
        f"{r.label}: {r.status}: {r.reason}" for r in rows if r.status in ("missing", "unsupported")
    )
    for r in shown:
        if r.status != "ok":
            where = f"M={r.M}, " if r.batch_size is None else f"batch {r.batch_size}, "
            notes[f"{where}{r.label}: {r.status}: {r.reason}"] = None
    return Table(
        title,
        heads,
        tuple(cells(r) for r in shown),
        frozenset(end - 1 for end in ends),
        tuple(notes),
    )


def _method(r: Record) -> str:
    if r.method == "none":
        return ""
    return f"{r.method} (both)" if r.dropout and r.dropout_on == "both" else r.method


def _error(r: Record) -> str:
    if r.error_ratio is None:
        return NOTHING if r.status != "wrong" else "not finite"
    return f"{r.error_ratio:.2f}"


def _speed(r: Record) -> tuple[str, ...]:
    """error, ratio, its interval, step, forward, backward, tokens a second; a row that is not ok shows its status instead."""
    if r.status != "ok":
        return (_error(r), r.status, *(NOTHING,) * 5)
    interval = NOTHING if r.ratio_low is None else f"{r.ratio_low:.2f}–{r.ratio_high:.2f}"
    times = (
        number(value, ".3g") if value is None or value < 100 else f"{value:.0f}"
        for value in (r.step_ms, r.fwd_ms, r.bwd_ms)
    )
    return (
        _error(r),
        number(r.ratio_to_frozen, ".2f"),
        interval,
        *times,
        number(r.tokens_per_s, ",.0f"),
    )


def _floors(r: Record) -> tuple[str, ...]:
    """Beside a library's products, and fused into them."""
    return (number(r.floor, ".2f"), number(r.fused_floor, ".2f"))


def _bytes(r: Record) -> tuple[str, ...]:
    """saved, what is kept by reference, activations, peak."""
    kept = NOTHING if r.saved_by_reference is None else "+".join(r.saved_by_reference) or "none"
    return (size(r.saved_bytes), kept, size(r.activation_bytes), size(r.peak_bytes))


def number(value: float | None, form: str) -> str:
    """A figure, or a dash where there is none."""
    return NOTHING if value is None else format(value, form)


def size(count: int | None) -> str:
    """Bytes in the unit that suits."""
    if count is None:
        return NOTHING
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} B"
