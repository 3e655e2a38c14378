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

from lorafast.bench.record import Record


class Table(NamedTuple):
    """A title, heads, and rows of cells; notes say what a cell cannot. `sections`: rows after which a rule is drawn."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    sections: frozenset[int]
    notes: tuple[str, ...]


NOTHING = "–"
# Trust stands before speed.
_LINEAR = (
    "M",
    "impl",
    "method",
    "error",
    "× frozen",
    "p20–p80",
    "step ms",
    "fwd ms",
    "bwd ms",
    "tokens/s",
    "saved",
    "+ by ref",
    "held",
    "peak",
)
_STEP = (
    "batch",
    "impl",
    "method",
    "error",
    "× frozen",
    "p20–p80",
    "step ms",
    "fwd ms",
    "bwd ms",
    "tokens/s",
    "saved",
    "held",
    "peak",
)
_TRAINING = (
    "impl",
    "method",
    "error",
    "loss: first 10",
    "last 10",
    "accuracy",
    "× frozen",
    "step ms",
    "lr",
    "trainable",
    "optimizer",
)


def tables(records: Iterable[Record]) -> list[Table]:
    """One table a kind of problem, rows in the order they were measured."""
    kinds: dict[tuple, list[Record]] = {}
    for record in records:
        kinds.setdefault(_kind(record), []).append(record)
    makers = {"linear": _linear, "step": _step, "training": _training}
    return [makers[kind[0]](rows) for kind, rows in kinds.items()]


def show(found: list[Table], console: Console) -> None:
    """Print them."""
    for table in found:
        drawn = RichTable(title=Text(table.title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for index, head in enumerate(table.heads):
            drawn.add_column(Text(head), justify="left" if head in ("impl", "method") else "right", no_wrap=index < 6)
        for index, row in enumerate(table.rows):
            drawn.add_row(*(Text(cell) for cell in row), end_section=index in table.sections)
        console.print(drawn)
        for note in table.notes:
            console.print(Text(note, style="dim"))


def _kind(r: Record) -> tuple:
    if r.bench == "linear":
        return "linear", r.K, r.N, r.R, r.dtype, r.dropout, r.bias, r.device
    return r.bench, r.model, r.seq, r.R, r.dtype, r.dropout, r.device


def _linear(rows: list[Record]) -> Table:
    r = rows[0]
    title = f"one layer {r.K} → {r.N}, R={r.R}, {r.dtype}, dropout {r.dropout:g}{', bias' if r.bias else ''}, on {r.device}"

    def cells(r: Record) -> tuple[str, ...]:
        bytes_ = (size(r.saved_bytes), _referenced(r), size(r.activation_bytes), size(r.peak_bytes))
        return (str(r.M), r.impl, _method(r), *_speed(r), *bytes_)

    return _table(title, _LINEAR, rows, cells, lambda r: r.M)


def _step(rows: list[Record]) -> Table:
    r = rows[0]
    title = f"{r.model}, one step by batch size, {r.seq} tokens each, R={r.R}, {r.dtype}, dropout {r.dropout:g}, on {r.device}"

    def cells(r: Record) -> tuple[str, ...]:
        bytes_ = (size(r.saved_bytes), size(r.activation_bytes), size(r.peak_bytes))
        return (str(r.batch_size), r.impl, _method(r), *_speed(r), *bytes_)

    return _table(title, _STEP, rows, cells, lambda r: r.batch_size)


def _training(rows: list[Record]) -> Table:
    r = rows[0]
    steps = max((len(r.losses) for r in rows if r.losses), default=0)
    title = f"{r.model}, {steps} steps of {r.batch_size} × {r.seq} tokens, R={r.R}, {r.dtype}, dropout {r.dropout:g}, on {r.device}"

    def cells(r: Record) -> tuple[str, ...]:
        first, last = (f"{statistics.fmean(part):.3f}" for part in (r.losses[:10], r.losses[-10:])) if r.losses else (NOTHING,) * 2
        _, ratio, _, step, *_ = _speed(r)
        return (
            r.impl, _method(r), _error(r), first, last, number(r.accuracy, ".3f"), ratio, step, number(r.lr, "g"),
            number(r.trainable, ",d"), size(r.optimizer_bytes),
        )  # fmt: skip

    table = _table(title, _TRAINING, rows, cells, lambda r: 0)
    return table._replace(notes=(*_apart(rows), *table.notes))


def _apart(rows: list[Record]) -> tuple[str, ...]:
    """How far our loss ever was from PEFT's."""
    curves = {(r.impl, r.method): r.losses for r in rows if r.losses}
    notes = []
    for (impl, method), ours in curves.items():
        theirs = curves.get(("peft", method)) if impl == "lorafast" else None
        if theirs:
            most = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
            notes.append(f"{method}: the loss is at most {most:.2g} from PEFT's at any of {len(ours)} steps")
    return tuple(notes)


def _table(title: str, heads: tuple[str, ...], rows: list[Record], cells: Callable, section: Callable[[Record], int]) -> Table:
    # What there is nothing to measure of is a note, not a row of dashes at every size.
    shown = [r for r in rows if r.status not in ("missing", "unsupported")]
    ends = itertools.accumulate(len(list(group)) for _, group in itertools.groupby(shown, key=section))
    notes = dict.fromkeys(f"{r.label}: {r.status}: {r.reason}" for r in rows if r.status in ("missing", "unsupported"))
    for r in shown:
        if r.status != "ok":
            where = f"M={r.M}, " if r.batch_size is None else f"batch {r.batch_size}, "
            notes[f"{where}{r.label}: {r.status}: {r.reason}"] = None
    return Table(title, heads, tuple(cells(r) for r in shown), frozenset(end - 1 for end in ends), tuple(notes))


def _method(r: Record) -> str:
    if r.method == "none":
        return ""
    return f"{r.method} (drops both)" if r.dropout and r.dropout_on == "both" else r.method


def _error(r: Record) -> str:
    if r.error_ratio is None:
        return NOTHING if r.status != "wrong" else "not finite"
    return f"{r.error_ratio:.2f}"


def _speed(r: Record) -> tuple[str, ...]:
    """error, ratio, its spread, step, forward, backward, tokens a second; a row that is not ok shows its status instead."""
    if r.status != "ok":
        return (_error(r), r.status, *(NOTHING,) * 5)
    spread = NOTHING if r.ratio_to_frozen is None else f"{r.ratio_to_frozen_p20:.2f}–{r.ratio_to_frozen_p80:.2f}"
    times = (number(value, ".3g") if value is None or value < 100 else f"{value:.0f}" for value in (r.step_ms, r.fwd_ms, r.bwd_ms))
    return (_error(r), number(r.ratio_to_frozen, ".2f"), spread, *times, number(r.tokens_per_s, ",.0f"))


def _referenced(r: Record) -> str:
    return NOTHING if r.saved_by_reference is None else "+".join(r.saved_by_reference) or "none"


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
