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
    "accelerated": ("#e9a23b", "P"),
    "eager": ("#6a994e", "X"),
    "peft": ("#2e6f95", "^"),
    "peft-bf16": ("#58a4b0", "v"),
}
# Its compiled form is the same, dashed.
_DASHED = (0, (4, 2))
_WIDTH, _HEIGHT = 3.9, 3.0
_MIB = 1 << 20


def figures(results: Iterable[Results]) -> dict[str, Figure]:
    """Every figure the rows allow, by name; rows of different files, shapes, ranks and dtypes never share one."""
    kinds: dict[tuple, list[Record]] = {}
    where = []
    for file, one in enumerate(results):
        where.append(one.env.get("device_name", ""))
        for r in one.records:
            if r.status == "ok":
                what = (
                    f"{r.K}→{r.N}{' with bias' * bool(r.bias)}" if r.bench == "linear" else r.model
                )
                size = r.batch_size if r.bench == "training" else None
                kinds.setdefault((file, r.bench, what, r.seq, r.R, r.dtype, size), []).append(r)
    found = {}
    for (file, bench, what, _, R, dtype, _), rows in kinds.items():
        for name, figure in _drawn(bench, rows).items():
            figure.suptitle(
                f"{what}, {_batch(rows[0])}R={R}, {dtype} on {where[file]}", fontsize=11
            )
            found[
                _unique(
                    f"{bench}-{what.replace('→', 'x').replace(' ', '-')}-r{R}-{dtype}-{name}", found
                )
            ] = figure
    return found


def _drawn(bench: str, rows: list[Record]) -> dict[str, Figure]:
    if bench == "training":
        return {"loss": _losses(rows)}
    x, across = (_batch_size, "batch size") if bench == "step" else (_tokens, "tokens per batch M")
    value, axis = (
        (_time, "step time, ms") if bench == "step" else (_ratio, "step time ÷ frozen layer's")
    )
    name = "time" if bench == "step" else "ratio"
    return {
        name: _grid(rows, axis, value, across, x),
        "peak": _grid(rows, "peak memory of a step, MiB", _peak, across, x),
    }


def _batch(r: Record) -> str:
    return (
        ""
        if r.seq is None
        else f"{r.batch_size} × {r.seq} tokens, "
        if r.bench == "training"
        else f"{r.seq} tokens a text, "
    )


def _unique(name: str, taken: dict[str, Figure]) -> str:
    return next(
        one for i in itertools.count(1) if (one := name if i == 1 else f"{name}-{i}") not in taken
    )


def svg(figure: Figure) -> str:
    """The figure as one <svg> element, its text as text, and the same bytes for the same rows."""
    file = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "lorafast"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]


Value = Callable[[Record], tuple[float, float, float] | None]


def _ratio(r: Record) -> tuple[float, float, float] | None:
    return (
        None
        if r.ratio_to_frozen is None
        else (r.ratio_to_frozen, r.ratio_to_frozen_p20, r.ratio_to_frozen_p80)
    )


def _tokens(r: Record) -> int:
    return r.M


def _batch_size(r: Record) -> int:
    return r.batch_size


def _time(r: Record) -> tuple[float, float, float] | None:
    return r.step_ms, r.step_ms_p20, r.step_ms_p80


def _peak(r: Record) -> tuple[float, float, float] | None:
    return None if r.peak_bytes is None else (r.peak_bytes / _MIB,) * 3


def _grid(
    rows: list[Record], axis: str, value: Value, across: str, x: Callable[[Record], int]
) -> Figure:
    """One panel a method and dropout; the bare layers, which have neither method nor dropout, are in all of them."""
    methods, dropouts = _methods(rows), list(dict.fromkeys(r.dropout for r in rows))
    figure = Figure((_WIDTH * len(methods), _HEIGHT * len(dropouts) + 0.9), layout="constrained")
    # A method keeps its scale over its panels: DoRA's would hide what there is to see of the others.
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


def _methods(rows: list[Record]) -> list[str]:
    return list(dict.fromkeys(r.method for r in rows if r.method != "none")) or ["none"]


def _losses(rows: list[Record]) -> Figure:
    """Loss by step, each point the mean of the ten steps around it; one panel a method and dropout."""
    columns = [
        (method, dropout)
        for method in _methods(rows)
        for dropout in dict.fromkeys(r.dropout for r in rows)
    ]
    figure = Figure((_WIDTH * len(columns), _HEIGHT + 0.9), layout="constrained")
    panels = figure.subplots(1, len(columns), squeeze=False, sharey=True)[0]
    for panel, (method, dropout) in zip(panels, columns, strict=True):
        for r in rows:
            if r.method in (method, "none") and r.dropout == dropout:
                color, _, _ = _style(r.impl)
                # Two right implementations follow one curve: PEFT's is dashed, so that both are seen.
                style = _DASHED if r.impl.startswith("peft") else "-"
                smooth = [
                    statistics.fmean(r.losses[max(0, i - 5) : i + 5]) for i in range(len(r.losses))
                ]
                panel.plot(
                    range(1, len(smooth) + 1),
                    smooth,
                    color=color,
                    linestyle=style,
                    linewidth=1.8,
                    label=r.impl,
                )
        panel.set_title(f"{method}, dropout {dropout:g}", fontsize=10)
        panel.set_xlabel("step")
        _plain(panel)
    panels[0].set_ylabel("training loss, mean of 10 steps")
    return _with_legend(figure)


def _curves(panel: Axes, rows: list[Record], value: Value, x: Callable[[Record], int]) -> None:
    for impl in dict.fromkeys(r.impl for r in rows):
        points = sorted((x(r), value(r)) for r in rows if r.impl == impl and value(r) is not None)
        if not points:
            continue
        xs, (middle, low, high) = (
            [at for at, _ in points],
            zip(*(found for _, found in points), strict=True),
        )
        color, mark, style = _style(impl)
        panel.plot(
            xs,
            middle,
            color=color,
            marker=mark,
            linestyle=style,
            markersize=4.5,
            linewidth=1.6,
            label=impl,
        )
        panel.fill_between(xs, low, high, color=color, alpha=0.15, linewidth=0)
    ticks = sorted({x(r) for r in rows})
    panel.set_xscale("log", base=2)
    panel.set_xticks(ticks)
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda at, _: f"{at:g}"))
    _plain(panel)


def _floors(panel: Axes, rows: list[Record], x: Callable[[Record], int]) -> None:
    """The least any of the rows computes beside a library's products: no curve of measurements, so no marks."""
    least: dict[int, float] = {}
    for r in rows:
        if r.floor is not None:
            least[x(r)] = min(r.floor, least.get(x(r), r.floor))
    if least:
        panel.plot(
            *zip(*sorted(least.items()), strict=True),
            color="#111827",
            linestyle=":",
            linewidth=1.2,
            label="floor",
        )


def _style(impl: str) -> tuple[str, str, object]:
    base, compiled, _ = impl.partition("+compile")
    return *STYLE[base], _DASHED if compiled else "-"


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
    figure.legend(
        named.values(), named.keys(), loc="outside lower center", ncols=len(named), frameon=False
    )
    return figure
