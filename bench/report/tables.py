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
from lorafast.bench.report.record import MAX_FROZEN_SPREAD, Record, Results


class Table(NamedTuple):
    """A title, column heads, and rows of cells.

    sections: indices of the rows after which a line is drawn.
    notes: what does not fit in a cell.
    busy: indices of the rows that are greyed, because the machine was busy.
    """

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    sections: frozenset[int]
    notes: tuple[str, ...]
    busy: frozenset[int] = frozenset()


NOTHING = "–"
# The two numbers that most readers come for are first. A console of 80 columns has room for what
# follows up to "step ms"; the rest is a second part there.
_MAIN = ("× frozen", "peak", "95 % interval", "err ratio")
_BYTES = ("saved", "by reference", "activations")
_TIMES = ("fwd ms", "bwd ms", "tokens/s")
_LINEAR = ("M", "impl", "method", *_MAIN, "step ms", *_BYTES, *_TIMES, "floor", "fused")
_EXPERTS = ("experts", "routing", "M", *_LINEAR[1:])
_STEP = ("batch", "impl", "method", *_MAIN, "step ms", *_BYTES, *_TIMES)
_GENERATE = ("impl", "method", *_MAIN, "ms", "tokens/s")
_ESTIMATE = ("batch", "impl", "method", "memory", "largest batch", "modelled ms", "weights")
_ESTIMATE += ("optimizer state", "step's peak", "measured", "activations", "head", "gradients")
_LOSSES = ("loss: first 10", "last 10", "held-out accuracy")
_TRAINED = ("step ms", "lr", "trained params", "optimizer", "optimizer state")
_TRAINING = ("impl", "method", "× frozen", "peak", "err ratio", *_LOSSES, *_TRAINED)
# The columns of words, which are aligned to the left.
WORDS = ("impl", "method", "optimizer", "routing")
# Statuses of rows that cannot be measured. They are notes, not rows of dashes.
_NOT_SHOWN = ("missing", "unsupported")
_BUSY = (
    "grey rows: this machine was busy. The frozen step's time scatters up to ×{:.2f} between p20 "
    f"and p80; above ×{MAX_FROZEN_SPREAD:g} no ratio says much."
)

LEGEND = (
    "err ratio: RMS error against float64 ÷ the eager chain's, the worst over y and every "
    "gradient; above 2 a row is wrong and shows no speed. Of a model: over the logits and each "
    "kind of gradient, for 16 texts, with random adapter parameters and dropout.",
    "× frozen: time of a step ÷ the frozen one's of the same round, median, and the 95 % interval "
    "of that median. A step is forward, and backward with dx; in inference, forward alone; of a "
    "model, the optimizer's step too, and its frozen row trains the head alone. generate: the time "
    "of a whole call of generate() ÷ that of the model without adapters.",
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
ESTIMATE_LEGEND = (
    "estimate: a training step of the model's own code on tensors without values, whose bytes are "
    "counted. memory: weights + optimizer state + step's peak, gradients included; without the "
    "allocator's rounding, cuBLAS' workspace and CUDA's context, for which the reserve is. A text "
    "has no padding. measured: step's peak of the same step taken on this machine.",
    "On a card: FlashAttention-2 as torch has it, dropout's masks of one byte, AdamW's foreach "
    "form, lorafast's primitives by Triton's kernels in 16 bits. modelled ms: every operation "
    "takes the time of its flops or of its bytes at the card's published rates, reduced to what "
    "large products and copies reach; nothing is measured.",
    "nf4, fp8: computed from the dense step: the frozen linears' weights in that format (NF4 with "
    "double quantisation), and one dequantised weight at a time. head: the part of activations "
    "that the head and the loss make.",
)


def legend(results: Iterable[Results]) -> tuple[str, ...]:
    """Return the notes that explain the columns of these results."""
    kinds = {r.bench == "estimate" for one in results for r in one.records}
    measured = () if kinds == {True} else LEGEND
    return (*measured, *(ESTIMATE_LEGEND if True in kinds else ()))


def tables(results: Iterable[Results]) -> list[Table]:
    """Return a table for each kind of problem of each file, rows in the order of measurement."""
    makers = {
        "linear": _linear, "step": _step, "training": _training, "generate": _generate,
        "experts": _experts, "block": _block, "estimate": _estimate,
    }  # fmt: skip
    found, titles = [], set()
    for one in results:
        kinds: dict[tuple, list[Record]] = {}
        for record in one.records:
            kinds.setdefault(_kind(record), []).append(record)
        where = one.env.get("device_name", "")
        for kind, rows in kinds.items():
            table = makers[kind[0]](rows)
            # Nothing of an estimate depends on the machine that computed it.
            title = table.title if kind[0] == "estimate" else f"{table.title}, on {where}"
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
        console.print(Text(table.title, style="bold"))
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
    drawn = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, space, 0, 0))
    for head in heads:
        drawn.add_column(Text(head), justify="left" if head in WORDS else "right", no_wrap=True)
    for index, row in enumerate(table.rows):
        cells = dict(zip(table.heads, row, strict=True))
        style = "bright_black" if index in table.busy else ""
        texts = (Text(cells[head], style=style) for head in heads)
        drawn.add_row(*texts, end_section=index in table.sections)
    return drawn


def _kind(r: Record) -> tuple:
    """Return what the rows of one table have in common."""
    if r.bench == "linear":
        return "linear", r.K, r.N, r.R, r.dtype, r.dropout, r.bias, r.inference, r.run
    if r.bench == "experts":
        return "experts", r.K, r.N, r.R, r.dtype, r.dropout, r.top_k, r.run
    if r.bench == "estimate":
        kind = r.bench, r.model_name, r.seq, r.R, r.dtype, r.dropout, r.device, r.checkpointing
        return *kind, r.base_format, r.run
    size = {"training": r.batch_size, "generate": r.M}.get(r.bench)
    return r.bench, r.model_name, r.seq, r.R, r.dtype, r.dropout, size, r.run


def _linear(rows: list[Record]) -> Table:
    r = rows[0]
    what = "inference" if r.inference else f"dropout {r.dropout:g}"
    title = f"one layer {r.K} → {r.N}, R={r.R}, {r.dtype}, {what}"
    if r.bias:
        title += ", bias"
    return _table(title, _LINEAR, rows, lambda r: {"M": str(r.M)}, lambda r: r.M)


def _experts(rows: list[Record]) -> Table:
    r = rows[0]
    title = f"experts of {r.K} → {r.N}, top {r.top_k}, R={r.R}, {r.dtype}, dropout {r.dropout:g}"

    def cells(r: Record) -> dict[str, str]:
        return {"M": str(r.M), "experts": str(r.experts), "routing": r.routing}

    return _table(title, _EXPERTS, rows, cells, lambda r: (r.experts, r.routing, r.M))


def _block(rows: list[Record]) -> Table:
    r = rows[0]
    title = f"{r.model}, {r.M} tokens, R={r.R}, {r.dtype}, dropout {r.dropout:g}"
    return _table(title, _LINEAR[1:], rows, lambda r: {}, lambda r: 0)


def _step(rows: list[Record]) -> Table:
    r = rows[0]
    title = f"{r.model_name}, one step by batch size, {r.seq} tokens each, R={r.R}, {r.dtype}"
    title += f", dropout {r.dropout:g}"
    return _table(
        title, _STEP, rows, lambda r: {"batch": str(r.batch_size)}, lambda r: r.batch_size
    )


def _training(rows: list[Record]) -> Table:
    r = rows[0]
    steps = max((len(r.losses) for r in rows if r.losses), default=0)
    title = f"{r.model_name}, {steps} steps of {r.batch_size} × {r.seq} tokens, R={r.R}, {r.dtype}"
    title += f", dropout {r.dropout:g}"
    table = _table(title, _TRAINING, rows, _learned, lambda r: 0)
    return table._replace(notes=(*_loss_gaps(rows), *table.notes))


def _generate(rows: list[Record]) -> Table:
    r = rows[0]
    title = f"{r.model} generates {r.M} tokens after {r.seq}, one text, R={r.R}, {r.dtype}"
    return _table(title, _GENERATE, rows, lambda r: {"ms": _milliseconds(r.step_ms)}, lambda r: 0)


def _estimate(rows: list[Record]) -> Table:
    r = rows[0]
    title = f"estimate of {r.model_name}, {r.seq} tokens a text, R={r.R}, {r.dtype}"
    if r.dropout:
        title += f", dropout {r.dropout:g}"
    title += f", on {r.device}{', checkpointing' if r.checkpointing else ''}"
    rows = sorted(rows, key=lambda r: r.batch_size)
    table = _table(title, _ESTIMATE, rows, _estimated, lambda r: r.batch_size)
    formats = next((one.weight_formats for one in rows if one.weight_formats), None)
    if formats:
        shown = ", ".join(f"{name} {size(count)}" for name, count in formats.items())
        table = table._replace(notes=(f"weights of the model: {shown}", *table.notes))
    if r.card_bytes:
        note = f"largest batch: the most texts whose memory is at most {size(r.card_bytes)}"
        table = table._replace(notes=(note, *table.notes))
    return table


def _estimated(r: Record) -> dict[str, str]:
    """Return the cells of an estimate that other rows lack."""
    return {
        "batch": str(r.batch_size),
        "memory": size(r.total_bytes) if r.ok else r.status,
        "largest batch": NOTHING if r.largest_batch is None else str(r.largest_batch),
        "modelled ms": _milliseconds(r.modelled_ms),
        "weights": size(r.weight_bytes),
        "optimizer state": size(r.optimizer_bytes),
        "step's peak": size(r.peak_bytes),
        "measured": size(r.measured_peak_bytes),
        "head": size(r.head_bytes),
        "gradients": size(r.grad_bytes),
    }


def _learned(r: Record) -> dict[str, str]:
    """Return the cells of a trained model that other rows lack."""
    first = last = NOTHING
    if r.losses:
        first, last = (f"{statistics.fmean(p):.3f}" for p in (r.losses[:10], r.losses[-10:]))
    return {
        "loss: first 10": first,
        "last 10": last,
        "held-out accuracy": number(r.accuracy, ".3f"),
        "lr": number(r.lr, "g"),
        "trained params": number(r.trainable, ",d"),
        "optimizer": r.optimizer or NOTHING,
        "optimizer state": size(r.optimizer_bytes),
    }


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
    more_cells: Callable[[Record], dict[str, str]],
    section: Callable[[Record], int],
) -> Table:
    """Return a table of the columns `heads`; more_cells gives those that not every row has."""
    shown = [r for r in rows if r.status not in _NOT_SHOWN]
    groups = itertools.groupby(shown, key=section)
    ends = itertools.accumulate(len(list(group)) for _, group in groups)
    hidden = [f"{r.label}: {r.status}: {r.reason}" for r in rows if r.status in _NOT_SHOWN]
    failed = []
    for r in shown:
        if not r.ok:
            where = f"batch {r.batch_size}" if r.batch_size else f"M={r.M}"
            failed.append(f"{where}, {r.label}: {r.status}: {r.reason}")
    # One note for what cannot be measured at any size.
    notes = dict.fromkeys([*hidden, *failed])
    sections = frozenset(end - 1 for end in ends)
    cells = [_cells(r) | more_cells(r) for r in shown]
    # A column without a value in any row is left out, but for the main ones.
    heads = tuple(h for h in heads if h in _MAIN or any(row[h] != NOTHING for row in cells))
    made = tuple(tuple(row[head] for head in heads) for row in cells)
    busy = frozenset(index for index, r in enumerate(shown) if r.busy)
    if busy:
        spread = max(shown[index].frozen_spread for index in busy)
        notes[_BUSY.format(spread)] = None
    return Table(title, heads, made, sections, tuple(notes), busy)


def _method(r: Record) -> str:
    if r.method == "none":
        return ""
    return f"{r.method} (both)" if r.dropout and r.dropout_on == "both" else r.method


def _cells(r: Record) -> dict[str, str]:
    """Return the cells of a row by their column.

    A row that is not ok has its status in the place of the ratio.
    """
    if r.error_ratio is not None:
        error = f"{r.error_ratio:.2f}"
    else:
        error = "not finite" if r.status == "wrong" else NOTHING
    by_reference = NOTHING
    if r.saved_by_reference is not None:
        by_reference = "+".join(r.saved_by_reference) or "none"
    has_interval, has_time = r.ratio_low is not None, r.step_ms is not None
    return {
        "impl": r.impl,
        "method": _method(r),
        "× frozen": number(r.ratio_to_frozen, ".2f") if r.ok else r.status,
        "peak": size(r.peak_bytes),
        "95 % interval": f"{r.ratio_low:.2f}–{r.ratio_high:.2f}" if has_interval else NOTHING,
        "err ratio": error,
        "step ms": _milliseconds(r.step_ms),
        "fwd ms": _milliseconds(r.fwd_ms),
        "bwd ms": _milliseconds(r.bwd_ms),
        "tokens/s": f"{r.M / (r.step_ms / 1e3):,.0f}" if has_time else NOTHING,
        "saved": size(r.saved_bytes),
        "by reference": by_reference,
        "activations": size(r.activation_bytes),
        "floor": number(r.floor, ".2f"),
        "fused": number(r.fused_floor, ".2f"),
    }


def _milliseconds(ms: float | None) -> str:
    return number(ms, ".3g") if ms is None or ms < 100 else f"{ms:.0f}"


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
