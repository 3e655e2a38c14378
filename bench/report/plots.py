"""Figures of rows: ratio and memory by tokens for one layer; loss, time and memory for a model."""

from __future__ import annotations

import io
import itertools
import statistics
from collections.abc import Callable, Iterable

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from lorafast.bench.report.record import Record, Results

# The colour and the marker of an implementation, the same in every figure.
STYLE = {
    "frozen": ("#6b7280", "o"),
    "full": ("#b08968", "s"),
    "lorafast": ("#d1495b", "D"),
    "accelerated": ("#e9a23b", "P"),
    "eager": ("#6a994e", "X"),
    "peft": ("#2e6f95", "^"),
    "merged": ("#7b5ea7", "*"),
    "peft-bf16": ("#58a4b0", "v"),
}
# The colours and markers of methods in one panel, full fine-tuning first.
_METHOD_STYLES = (
    *(("#6b7280", "s"), ("#2e6f95", "^"), ("#58a4b0", "v"), ("#7b5ea7", "*"), ("#6a994e", "X")),
    *(("#e9a23b", "P"), ("#d1495b", "D")),
)
# A compiled implementation has the same colour, dashed.
_DASHED = (0, (4, 2))
_WIDTH, _HEIGHT = 3.9, 3.0
_MIB, _GIB = 1 << 20, 1 << 30

# A value with the ends of its interval.
Value = Callable[[Record], tuple[float, float, float] | None]


def figures(results: Iterable[Results]) -> dict[str, Figure]:
    """Return every figure that the rows allow, by name.

    Rows of different files, runs, shapes, ranks or dtypes are in different figures.
    """
    kinds: dict[tuple, list[Record]] = {}
    where = []
    for file, one in enumerate(results):
        where.append(one.env.get("device_name", ""))
        for r in one.records:
            if r.ok:
                kinds.setdefault((file, _subject(r), *_kind(r)), []).append(r)
    found = {}
    for (file, subject, *_), rows in kinds.items():
        r = rows[0]
        for name, figure in _drawn(r.bench, rows).items():
            title = f"{subject}, {_batch(r)}R={r.R}, {r.dtype} on {where[file]}"
            if r.bench == "estimate":
                checkpointing = ", checkpointing" if r.checkpointing else ""
                title = f"{subject}, {_batch(r)}R={r.R}, {r.dtype}{checkpointing}: estimated"
            figure.suptitle(title, fontsize=11)
            stem = f"{subject.replace('→', 'x').replace(' ', '-')}-r{r.R}-{r.dtype}-{name}"
            found[_unique(f"{r.run or r.bench}-{stem}", found)] = figure
    return found


def _subject(r: Record) -> str:
    """Return the shape of a layer, or the name of a model."""
    if r.bench == "experts":
        return f"experts of {r.K}→{r.N}"
    if r.bench != "linear":
        return r.model_name
    what = " with bias" if r.bias else ""
    return f"{r.K}→{r.N}{what}{' in inference' if r.inference else ''}"


def _kind(r: Record) -> tuple:
    """Return what the rows of one figure have in common."""
    batch_size = r.batch_size if r.bench == "training" else None
    kind = r.bench, r.seq, r.R, r.dtype, batch_size, r.run
    return (*kind, r.device, r.checkpointing) if r.bench == "estimate" else kind


def _drawn(bench: str, rows: list[Record]) -> dict[str, Figure]:
    if bench == "training":
        return {"loss": _losses(rows)}
    if bench in ("generate", "experts", "block"):
        return {}  # the rows have one size, which a table shows better
    if bench == "estimate":
        axis = "memory of a training step, GiB"
        return {"memory": _grid(rows, axis, _total, "batch size", _batch_size)}
    peak = "peak memory of a step, MiB"
    if bench == "step":
        across = "batch size"
        return {
            "time": _grid(rows, "step time, ms", _time, across, _batch_size),
            "peak": _grid(rows, peak, _peak, across, _batch_size),
        }
    across = "tokens per batch M"
    return {
        "ratio": _grid(rows, "step time ÷ frozen layer's", _ratio, across, _tokens),
        "peak": _grid(rows, peak, _peak, across, _tokens),
    }


def _batch(r: Record) -> str:
    """Return the part of a title that describes a model's batch."""
    if r.seq is None:
        return ""
    if r.bench == "training":
        return f"{r.batch_size} × {r.seq} tokens, "
    return f"{r.seq} tokens a text, "


def _unique(name: str, taken: dict[str, Figure]) -> str:
    """Return the name, with a number if it is taken."""
    if name not in taken:
        return name
    return next(one for i in itertools.count(2) if (one := f"{name}-{i}") not in taken)


def svg(figure: Figure) -> str:
    """Return the figure as one <svg> element with text as text.

    The same rows give the same bytes.
    """
    file = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "lorafast"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]


def _ratio(r: Record) -> tuple[float, float, float] | None:
    if r.ratio_to_frozen is None:
        return None
    low, high = r.ratio_to_frozen_p20, r.ratio_to_frozen_p80
    return r.ratio_to_frozen, _or(low, r.ratio_to_frozen), _or(high, r.ratio_to_frozen)


def _time(r: Record) -> tuple[float, float, float] | None:
    return r.step_ms, _or(r.step_ms_p20, r.step_ms), _or(r.step_ms_p80, r.step_ms)


def _peak(r: Record) -> tuple[float, float, float] | None:
    return None if r.peak_bytes is None else (r.peak_bytes / _MIB,) * 3


def _total(r: Record) -> tuple[float, float, float] | None:
    return None if r.total_bytes is None else (r.total_bytes / _GIB,) * 3


def _or(value: float | None, other: float) -> float:
    """Return the value, or the other one if there is none: compact files lack percentiles."""
    return other if value is None else value


def _tokens(r: Record) -> int:
    return r.M


def _batch_size(r: Record) -> int:
    return r.batch_size


def _grid(
    rows: list[Record], axis: str, value: Value, across: str, x: Callable[[Record], int]
) -> Figure:
    """Return a figure with a panel for each method and dropout.

    The layers without an adapter, which have no method and no dropout, are in all panels.
    """
    methods, dropouts = _methods(rows), list(dict.fromkeys(r.dropout for r in rows))
    figure = Figure((_WIDTH * len(methods), _HEIGHT * len(dropouts) + 0.9), layout="constrained")
    # The panels of one method share their scale; that of DoRA would flatten the other methods'.
    panels = figure.subplots(len(dropouts), len(methods), squeeze=False, sharex=True, sharey="col")
    for i, dropout in enumerate(dropouts):
        for j, method in enumerate(methods):
            here = [r for r in rows if r.dropout == dropout and r.method in (method, "none")]
            _curves(panels[i][j], here, value, x)
            if value is _ratio:
                _floors(panels[i][j], here, x)
            panels[i][j].set_title(f"{method}, dropout {dropout:g}", fontsize=10)
    for j in range(len(methods)):
        tops = [panel.dataLim.ymax for panel in panels[:, j] if panel.has_data()]
        if tops:
            panels[0][j].set_ylim(0, 1.05 * max(tops))
        panels[-1][j].set_xlabel(across)
    for line in panels:
        line[0].set_ylabel(axis)
    return _with_legend(figure)


def memory_by_method(rows: list[Record], titles: dict[str, str]) -> Figure:
    """Return the estimated memory by batch size, with a panel for each implementation.

    Every panel has a curve for each method and the one of full fine-tuning.

    rows: estimates that differ in implementation, method and batch size alone.
    titles: the implementations of the panels, and what they are called.
    """
    methods = _methods(rows)
    figure = Figure((_WIDTH * len(titles), _HEIGHT + 0.9), layout="constrained")
    panels = figure.subplots(1, len(titles), squeeze=False, sharey=True)[0]
    for panel, (impl, title) in zip(panels, titles.items(), strict=True):
        for index, method in enumerate(("full", *methods)):
            wanted = ("full", "none") if method == "full" else (impl, method)
            here = [r for r in rows if (r.impl, r.method) == wanted and r.ok]
            points = sorted((r.batch_size, r.total_bytes / _GIB) for r in here)
            if points:
                color, marker = _METHOD_STYLES[index % len(_METHOD_STYLES)]
                style = {"color": color, "marker": marker, "markersize": 4.5, "linewidth": 1.6}
                panel.plot(*zip(*points, strict=True), label=method, **style)
        panel.set_title(title, fontsize=10)
        _by_powers(panel, rows, _batch_size)
        panel.set_xlabel("batch size")
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel("memory of a training step, GiB")
    return _with_legend(figure)


def _methods(rows: list[Record]) -> list[str]:
    return list(dict.fromkeys(r.method for r in rows if r.method != "none")) or ["none"]


def _losses(rows: list[Record]) -> Figure:
    """Return a figure of the loss by step, with a panel for each method and dropout.

    Each point is the mean of the ten steps around it.
    """
    dropouts = list(dict.fromkeys(r.dropout for r in rows))
    columns = list(itertools.product(_methods(rows), dropouts))
    figure = Figure((_WIDTH * len(columns), _HEIGHT + 0.9), layout="constrained")
    panels = figure.subplots(1, len(columns), squeeze=False, sharey=True)[0]
    for panel, (method, dropout) in zip(panels, columns, strict=True):
        for r in rows:
            if r.method in (method, "none") and r.dropout == dropout:
                _loss_curve(panel, r)
        panel.set_title(f"{method}, dropout {dropout:g}", fontsize=10)
        panel.set_xlabel("step")
        _plain(panel)
    panels[0].set_ylabel("training loss, mean of 10 steps")
    return _with_legend(figure)


def _loss_curve(panel: Axes, r: Record) -> None:
    smooth = [statistics.fmean(r.losses[max(0, i - 5) : i + 5]) for i in range(len(r.losses))]
    # Two correct implementations have the same curve. PEFT's is dashed, so that both are visible.
    panel.plot(
        range(1, len(smooth) + 1),
        smooth,
        color=_style(r.impl)[0],
        linestyle=_DASHED if r.impl.startswith("peft") else "-",
        linewidth=1.8,
        label=r.impl,
    )


def _curves(panel: Axes, rows: list[Record], value: Value, x: Callable[[Record], int]) -> None:
    for impl in dict.fromkeys(r.impl for r in rows):
        points = sorted((x(r), value(r)) for r in rows if r.impl == impl and value(r) is not None)
        if not points:
            continue
        xs = [at for at, _ in points]
        middle, low, high = zip(*(found for _, found in points), strict=True)
        color, marker, style = _style(impl)
        panel.plot(
            xs,
            middle,
            color=color,
            marker=marker,
            linestyle=style,
            markersize=4.5,
            linewidth=1.6,
            label=impl,
        )
        panel.fill_between(xs, low, high, color=color, alpha=0.15, linewidth=0)
    _by_powers(panel, rows, x)


def _by_powers(panel: Axes, rows: list[Record], x: Callable[[Record], int]) -> None:
    """Let the panel have powers of two along its x axis."""
    panel.set_xscale("log", base=2)
    panel.set_xticks(sorted({x(r) for r in rows}))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda at, _: f"{at:g}"))
    _plain(panel)


def _floors(panel: Axes, rows: list[Record], x: Callable[[Record], int]) -> None:
    """Draw the least lower bound of the rows; without markers, because it is not measured."""
    least: dict[int, float] = {}
    for r in rows:
        if r.floor is not None:
            least[x(r)] = min(r.floor, least.get(x(r), r.floor))
    if least:
        xs, ys = zip(*sorted(least.items()), strict=True)
        panel.plot(xs, ys, color="#111827", linestyle=":", linewidth=1.2, label="floor")


def _style(impl: str) -> tuple[str, str, object]:
    base, compiled, _ = impl.partition("+compile")
    return *STYLE[base], _DASHED if compiled else "-"


def _plain(panel: Axes) -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    panel.set_axisbelow(True)


def _with_legend(figure: Figure) -> Figure:
    """Add one legend below all panels."""
    handles = {}
    for panel in figure.axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=len(handles),
        frameon=False,
    )
    return figure
