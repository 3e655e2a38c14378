"""Figures from rows: step ratio and memory by tokens for one layer; loss, step time and memory for a model."""

from __future__ import annotations

import io
import itertools
import statistics
from collections.abc import Callable, Iterable

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from lorafast.bench.record import Record, Results

# An implementation keeps its colour and its mark in every figure.
STYLE = {
    "frozen": ("#6b7280", "o"),
    "full": ("#b08968", "s"),
    "lorafast": ("#d1495b", "D"),
    "peft": ("#2e6f95", "^"),
    "peft-bf16": ("#58a4b0", "v"),
    "peft+compile": ("#7b5ea7", "P"),
}
_OTHER = ("#111827", "x")
_WIDTH, _HEIGHT = 3.9, 3.0
_MIB = 1 << 20
_PEAK, _TOKENS = "peak memory of a step, MiB", "tokens per batch M"


def figures(results: Iterable[Results]) -> dict[str, Figure]:
    """Every figure the rows allow, by name; rows of different machines, shapes, ranks and dtypes never share one."""
    kinds: dict[tuple, list[Record]] = {}
    for one in results:
        for r in one.records:
            if r.status == "ok":
                what = f"{r.K}→{r.N}" if r.bench == "linear" else r.model
                key = (r.bench, what, r.seq, r.R, r.dtype, one.env.get("device_name", r.device))
                kinds.setdefault(key, []).append(r)
    found = {}
    for (bench, what, _, R, dtype, machine), rows in kinds.items():
        for name, figure in _drawn(bench, rows).items():
            figure.suptitle(f"{what}, {_batch(rows[0])}R={R}, {dtype} on {machine}", fontsize=11)
            found[_unique(f"{bench}-{what.replace('→', 'x')}-r{R}-{dtype}-{name}", found)] = figure
    return found


def _drawn(bench: str, rows: list[Record]) -> dict[str, Figure]:
    if bench == "training":
        return {"loss": _losses(rows)}
    if bench == "step":
        return {"time": _grid(rows, "step time, ms", _time, "batch size"), "peak": _grid(rows, _PEAK, _peak, "batch size")}
    return {"ratio": _grid(rows, "step time ÷ frozen layer's", _ratio, _TOKENS), "peak": _grid(rows, _PEAK, _peak, _TOKENS)}


def _batch(r: Record) -> str:
    return "" if r.seq is None else f"{r.batch_size} × {r.seq} tokens, " if r.bench == "training" else f"{r.seq} tokens a text, "


def _unique(name: str, taken: dict[str, Figure]) -> str:
    return next(one for i in itertools.count(1) if (one := name if i == 1 else f"{name}-{i}") not in taken)


def svg(figure: Figure) -> str:
    """The figure as one <svg> element, its text as text, and the same bytes for the same rows."""
    file = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "lorafast"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]


Value = Callable[[Record], tuple[float, float, float] | None]


def _ratio(r: Record) -> tuple[float, float, float] | None:
    return None if r.ratio_to_frozen is None else (r.ratio_to_frozen, r.ratio_to_frozen_p20, r.ratio_to_frozen_p80)


def _time(r: Record) -> tuple[float, float, float] | None:
    return r.step_ms, r.step_ms_p20, r.step_ms_p80


def _peak(r: Record) -> tuple[float, float, float] | None:
    return None if r.peak_bytes is None else (r.peak_bytes / _MIB,) * 3


def _grid(rows: list[Record], axis: str, value: Value, across: str) -> Figure:
    """One panel a method and dropout; the bare layers, which have neither method nor dropout, are in all of them."""
    methods, dropouts = _methods(rows), list(dict.fromkeys(r.dropout for r in rows))
    figure = Figure((_WIDTH * len(methods), _HEIGHT * len(dropouts) + 0.9), layout="constrained")
    # A method keeps its scale over its panels: DoRA's would hide what there is to see of the others.
    panels = figure.subplots(len(dropouts), len(methods), squeeze=False, sharex=True, sharey="col")
    for i, dropout in enumerate(dropouts):
        for j, method in enumerate(methods):
            here = [r for r in rows if r.dropout == dropout and r.method in (method, "none")]
            _curves(panels[i][j], here, value, (lambda r: r.M) if across == _TOKENS else (lambda r: r.batch_size))
            panels[i][j].set_title(f"{method}, dropout {dropout:g}", fontsize=10)
    for j in range(len(methods)):
        tops = [panel.dataLim.ymax for panel in panels[:, j] if panel.has_data()]
        if tops:
            panels[0][j].set_ylim(0, 1.05 * max(tops))
        panels[-1][j].set_xlabel(across)
    for line in panels:
        line[0].set_ylabel(axis)
    return _with_legend(figure)


def _methods(rows: list[Record]) -> list[str]:
    return list(dict.fromkeys(r.method for r in rows if r.method != "none")) or ["none"]


def _losses(rows: list[Record]) -> Figure:
    """Loss by step, each point the mean of the ten steps around it; one column a method."""
    methods = _methods(rows)
    figure = Figure((_WIDTH * len(methods), _HEIGHT + 0.9), layout="constrained")
    panels = figure.subplots(1, len(methods), squeeze=False, sharey=True)[0]
    for panel, method in zip(panels, methods, strict=True):
        for r in rows:
            if r.method in (method, "none"):
                color, _ = STYLE.get(r.impl, _OTHER)
                # Two right implementations walk the same way: the one drawn later is dashed, so that both are seen.
                style = (0, (4, 3)) if r.impl.startswith("peft") else "-"
                smooth = [statistics.fmean(r.losses[max(0, i - 5) : i + 5]) for i in range(len(r.losses))]
                panel.plot(range(1, len(smooth) + 1), smooth, color=color, linestyle=style, linewidth=1.8, label=r.impl)
        panel.set_title(method, fontsize=10)
        panel.set_xlabel("step")
        _plain(panel)
    panels[0].set_ylabel("training loss, mean of 10 steps")
    return _with_legend(figure)


def _curves(panel: Axes, rows: list[Record], value: Value, x: Callable[[Record], int]) -> None:
    for impl in dict.fromkeys(r.impl for r in rows):
        points = sorted((x(r), value(r)) for r in rows if r.impl == impl and value(r) is not None)
        if not points:
            continue
        xs, (middle, low, high) = [at for at, _ in points], zip(*(found for _, found in points), strict=True)
        color, mark = STYLE.get(impl, _OTHER)
        panel.plot(xs, middle, color=color, marker=mark, markersize=4.5, linewidth=1.6, label=impl)
        panel.fill_between(xs, low, high, color=color, alpha=0.15, linewidth=0)
    ticks = sorted({x(r) for r in rows})
    panel.set_xscale("log", base=2)
    panel.set_xticks(ticks)
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda at, _: f"{at:g}"))
    _plain(panel)


def _plain(panel: Axes) -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    panel.set_axisbelow(True)


def _with_legend(figure: Figure) -> Figure:
    """One legend below for all panels."""
    named = {}
    for panel in figure.axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=len(named), frameon=False)
    return figure
