"""What lorafast.explain returns: a row for each adapted layer, and the tables made of them."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from lorafast.models.module_names import format_names
from lorafast.models.tables import html_list, html_table, text_table

# Backends of GPUs, whose reasons to refuse a weight on the CPU are no news.
_GPU_BACKENDS = ("cuda", "triton")
# Columns whose cells are aligned to the right.
_NUMBERS = ("n", "N x K", "r", "own", "x", "y", "modelled")
# The width that a table keeps to by naming the parent of all layers only once.
_TERMINAL_COLUMNS = 80
# The most ranges of indices that a name shows; more of them are shown as "*".
_MAX_RANGES = 3


class Row(NamedTuple):
    """One adapted layer of a model, in an Explanation.

    Attributes:
        name: name of the layer in the model.
        method: the adapter's class, such as "DoRA"; for a PEFT layer, PEFT's adapter name too.
        shape: (N, K) of the weight.
        r: the rank.
        saved: bytes per token that the layer itself keeps for backward; None where it runs on plain
            autograd.
        referenced: which of "x" and "y" backward needs too.
        backends: backend of each primitive; "none" if a forced backend refuses.
        why_not: reasons of each backend that was asked first and refused.
        notes: what the layer's options cost, and how a backend computes each primitive.
        referenced_bytes: bytes per token of each tensor in `referenced`. They cost memory only
            where no other layer or operation keeps the same tensor.
        device: type of the weight's device, such as "cpu".
        modelled: the time of the layer's training step by the frozen layer's on its GPU, by a model
            that counts (docs/modelled-steps.md), and no measurement; None where it says nothing.
    """

    name: str
    method: str
    shape: tuple[int, int]
    r: int
    saved: int | None
    referenced: tuple[str, ...]
    backends: dict[str, str]
    why_not: dict[str, tuple[str, ...]]
    notes: tuple[str, ...]
    referenced_bytes: dict[str, int]
    device: str
    modelled: float | None = None


class Group(NamedTuple):
    """Rows that differ in the indices of their names alone, such as one for each decoder layer.

    Attributes:
        name: the name that they have in common, such as "model.layers.*.self_attn.q_proj".
        rows: the rows, in module order.
    """

    name: str
    rows: tuple[Row, ...]


class Explanation(NamedTuple):
    """What lorafast.explain returns; str() gives a table, the refusals and the notes.

    The table has one line for layers that differ in the indices of their names alone. A notebook
    shows it in HTML.

    Attributes:
        rows: one Row for each adapted layer, in module order.
        missing: folders that this checkout of lorafast lacks, and how to restore each.
        lost: adapted layers that another tool has replaced since, and what is in their place.
        unreached: layers whose adapter trains and has no gradient, where others have one.
    """

    rows: tuple[Row, ...]
    missing: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    unreached: tuple[str, ...] = ()

    @property
    def groups(self) -> tuple[Group, ...]:
        """The rows, grouped by kind of layer."""
        return _groups(self.rows)

    @property
    def saved(self) -> int:
        """Bytes per token that all layers themselves keep for backward.

        Layers that run on plain autograd are not counted.
        """
        return sum(row.saved or 0 for row in self.rows)

    @property
    def referenced_bytes(self) -> dict[str, int]:
        """Bytes per token of all x, and of all y, that backward needs.

        They are counted once for each layer, and so are an upper bound: layers that read the same x
        share it, and another operation may keep it anyway.
        """
        by_layer: dict[tuple[str, str], int] = {}
        for row in self.rows:
            by_layer |= {(row.name, key): size for key, size in row.referenced_bytes.items()}
        totals: collections.Counter[str] = collections.Counter()
        for (_, key), size in by_layer.items():
            totals[key] += size
        return dict(totals)

    def __str__(self) -> str:
        if not self.rows:
            return "\n".join(["no adapted layer", *self.lost])
        header, lines = self._table()
        table = text_table(header, lines, _NUMBERS)
        parent = _common_parent([line[0] for line in lines[:-1]])
        if parent and max(map(len, table)) > _TERMINAL_COLUMNS:
            short = [(line[0].removeprefix(parent), *line[1:]) for line in lines]
            table = [f"layers of {parent[:-1]}", *text_table(header, short, _NUMBERS)]
        return "\n".join([*table, "", *self._remarks()])

    def _repr_html_(self) -> str:
        if not self.rows:
            return f"<p>no adapted layer</p>{html_list(self.lost)}"
        header, lines = self._table()
        return f"{html_table(header, lines, _NUMBERS)}\n{html_list(self._remarks())}"

    def _table(self) -> tuple[list[str], list[list[str]]]:
        """Return the header and the lines of the table, the total last."""
        totals = self.referenced_bytes
        tensors = [key for key in ("x", "y") if key in totals]
        modelled = ["modelled"] * any(row.modelled for row in self.rows)
        header = ["layer", "n", "method", "N x K", "r", "own", *tensors, *modelled, "backend"]
        lines = [_line(group, tensors, bool(modelled)) for group in self.groups]
        sums = [str(self.saved), *(str(totals[key]) for key in tensors), *("" for _ in modelled)]
        return header, [*lines, ["total", str(len(self.rows)), "", "", "", *sums, ""]]

    def _remarks(self) -> list[str]:
        """Return what is said below the table."""
        notes = dict.fromkeys(note for row in self.rows for note in row.notes)
        legend = _legend(self.referenced_bytes)
        if any(row.modelled for row in self.rows):
            legend.append(
                "modelled: a training step by the frozen layer's, in a model and not measured "
                '("modelled 1.17 × the frozen layer")'
            )
        unreached = []
        if self.unreached:
            unreached.append(
                f"no gradient, where others have one: {format_names(self.unreached)} (experts that "
                "no token reached, or layers that nothing calls, whose adapters have no effect)"
            )
        refusals = _refusals(self.rows)
        return [
            *self.lost, *unreached, *legend, *refusals, *sorted(_joined(notes)), *self.missing,
        ]  # fmt: skip


def _legend(referenced: Iterable[str]) -> list[str]:
    """Return the meaning of the columns that hold bytes."""
    meaning = {
        "x": "x: bytes per token of its input, free where something else keeps that too",
        "y": "y: bytes per token of its output, likewise",
    }
    own = "own: bytes per token that one layer saves for backward (total: all n layers)"
    return [own, *(meaning[key] for key in sorted(referenced))]


def _refusals(rows: Iterable[Row]) -> list[str]:
    """Return why backends do not serve the rows, a line for each backend and its reasons."""
    lines, idle = set(), set()
    for row in rows:
        is_forced = "none" in row.backends.values()
        for backend, reasons in row.why_not.items():
            if row.device == "cpu" and backend in _GPU_BACKENDS and not is_forced:
                idle.add(backend)
            else:
                lines.add(f"not {backend}: {'; '.join(reasons)}")
    if idle:
        lines.add(f"not {', '.join(sorted(idle))}: for GPUs, and these weights are on the CPU")
    return sorted(lines)


def _joined(notes: Iterable[str]) -> list[str]:
    """Return the notes, with one line for all primitives that a backend computes in one way."""
    primitives: dict[str, list[str]] = {}
    others = []
    for note in notes:
        primitive, by, route = note.partition(" by ")
        if by and primitive.isidentifier():
            primitives.setdefault(route, []).append(primitive)
        else:
            others.append(note)
    return [*others, *(f"{', '.join(names)} by {route}" for route, names in primitives.items())]


def _line(group: Group, tensors: Sequence[str], models: bool) -> list[str]:
    row = group.rows[0]
    N, K = row.shape
    return [
        group.name,
        str(len(group.rows)),
        row.method,
        f"{N} x {K}",
        str(row.r),
        "as torch" if row.saved is None else str(row.saved),
        *(str(row.referenced_bytes.get(key, "-")) for key in tensors),
        *[f"{row.modelled:.2f} ×" if row.modelled else "-"] * models,
        _backends(row.backends),
    ]


def _backends(backends: dict[str, str]) -> str:
    """Return the backend that serves most primitives, and the others with what they serve."""
    primitives: dict[str, list[str]] = {}
    for primitive, backend in backends.items():
        primitives.setdefault(backend, []).append(primitive)
    main, *others = sorted(primitives, key=lambda backend: -len(primitives[backend])) or ["-"]
    return ", ".join([main, *(f"{name} ({', '.join(primitives[name])})" for name in others)])


def _groups(rows: Iterable[Row]) -> tuple[Group, ...]:
    grouped: dict[tuple, list[Row]] = {}
    for row in rows:
        pattern = ".".join("*" if part.isdigit() else part for part in row.name.split("."))
        key = (
            (pattern, row.method), row.shape, row.r, row.saved, row.referenced,
            tuple(row.backends.items()), row.notes,
        )  # fmt: skip
        grouped.setdefault(key, []).append(row)
    kinds = collections.Counter(kind for kind, *_ in grouped)
    return tuple(
        Group(_common_name([row.name for row in members], kinds[kind] == 1), tuple(members))
        for (kind, *_), members in grouped.items()
    )


def _common_name(names: Sequence[str], is_only: bool) -> str:
    """Return names that differ in indices as one name.

    is_only: no other group has names of this form, so that "*" says enough. Otherwise the indices
    are shown.
    """
    parts = (name.split(".") for name in names)
    columns = [tuple(dict.fromkeys(column)) for column in zip(*parts, strict=True)]
    shows_indices = not is_only and sum(len(column) > 1 for column in columns) == 1
    return ".".join(
        column[0] if len(column) == 1 else _ranges(column) if shows_indices else "*"
        for column in columns
    )


def _ranges(indices: Iterable[str]) -> str:
    """Return indices as ranges, such as "0-3,8"; "*" if there are many of them."""
    ranges: list[list[int]] = []
    for index in sorted(map(int, indices)):
        if ranges and ranges[-1][1] == index - 1:
            ranges[-1][1] = index
        else:
            ranges.append([index, index])
    if len(ranges) > _MAX_RANGES:
        return "*"
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)


def _common_parent(names: Sequence[str]) -> str:
    """Return the longest parent of all names with a dot after it; "" if there is none."""
    parents = [name.split(".")[:-1] for name in names]
    common = []
    for parts in zip(*parents, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return "".join(f"{part}." for part in common)
