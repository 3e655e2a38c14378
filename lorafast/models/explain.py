"""lorafast.explain: what each adapted layer costs and which backend runs it, in words."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from torch import nn

from lorafast import dispatch, env, functional, links
from lorafast.layer import Linear
from lorafast.problem import PRIMITIVES, Problem


class Row(NamedTuple):
    """One adapted layer. saved: bytes per token kept for backward alone; referenced: what is kept that lives anyway."""

    name: str
    method: str
    shape: tuple[int, int]
    r: int
    saved: int
    referenced: tuple[str, ...]
    backends: dict[str, str]
    why_not: dict[str, tuple[str, ...]]
    notes: tuple[str, ...]


class Explanation(NamedTuple):
    """The rows of a model, and str() of them as a table. missing: rooms of this checkout that are not there, and the mend."""

    rows: tuple[Row, ...]
    missing: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.rows:
            return "no adapted layer"
        lines = [("layer", "method", "N x K", "r", "saved B/token", "by reference", "backend")]
        for row in self.rows:
            used = sorted(set(row.backends.values()))
            backend = used[0] if len(used) == 1 else ", ".join(f"{p}: {b}" for p, b in row.backends.items())
            N, K = row.shape
            lines.append(
                (row.name, row.method, f"{N} x {K}", str(row.r), str(row.saved), ", ".join(row.referenced) or "-", backend)
            )
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
        remarks = {f"{name}: {'; '.join(why)}" for row in self.rows for name, why in row.why_not.items()}
        notes = {note for row in self.rows for note in row.notes}
        return "\n".join(table + [f"not {remark}" for remark in sorted(remarks)] + sorted(notes) + list(self.missing))


def explain(model: nn.Module, tokens: int = 2048) -> Explanation:
    """Every lorafast.Linear of the model: method, bytes saved per token, backend per primitive for calls of `tokens` rows, why
    not the others, and what its settings cost. Activations are taken to have the weight's dtype.
    """
    missing = tuple(why for room in links.ROOMS if (why := links.why_missing(room)))
    return Explanation(tuple(_row(name, m, tokens) for name, m in model.named_modules() if isinstance(m, Linear)), missing)


def _row(name: str, layer: Linear, tokens: int) -> Row:
    a, e = layer.adapter, layer.weight.element_size()
    N, K = layer.weight.shape
    x = layer.weight.detach().new_empty(0, K)
    settings = layer._settings()._replace(dropout=a.dropout, dropout_on=a.dropout_on)
    problem = dataclasses.replace(Problem.of(x, layer._tensors(), settings), M=tokens)
    trains = {part for part in ("lora_A", "lora_B", "lora_core", "lora_magnitude", "lora_out_scale") if _trains(layer, part)}
    both = a.dropout > 0 and a.dropout_on == "both"
    keep = functional.kept(a.keep, a.axis, "lora_magnitude" in trains, both, layer.bias is None, layer.weight.dtype)
    saved = layer.r * e if trains & {"lora_B", "lora_core", "lora_out_scale"} or keep == "recompute" else 0
    remakes_x = keep == "recompute" or (a.axis == "in" and "lora_magnitude" in trains)
    referenced = ["x"] if "lora_A" in trains or remakes_x else []
    if keep == "inner":
        saved += N * e
    elif keep == "output":
        referenced.append("y")
    backends, why_not = {}, {}
    for primitive in PRIMITIVES if a.axis and layer.lora_magnitude is not None else PRIMITIVES[:-1]:
        backends[primitive] = dispatch.pick(primitive, problem).__name__.rsplit(".", 1)[-1]
        if env.backend() == "auto":
            for other in dispatch.ORDER[: dispatch.ORDER.index(backends[primitive])]:
                why_not[other] = why_not.get(other, ()) + dispatch.why_not(other, primitive, problem)
    why_not = {other: tuple(dict.fromkeys(why)) for other, why in why_not.items()}
    return Row(
        name or "(this layer)", type(a).__name__, (N, K), layer.r, saved, tuple(referenced), backends, why_not, _notes(layer, keep)
    )


def _trains(layer: Linear, part: str) -> bool:
    held = getattr(layer, part)
    return held is not None and held.requires_grad


def _notes(layer: Linear, keep: str) -> tuple[str, ...]:
    a, notes = layer.adapter, []
    if layer.merged:
        notes.append("merged: the layer runs as a plain linear, and its adapter does not train")
    if layer.weight.requires_grad:
        notes.append("weight.requires_grad: the layer runs on plain autograd, with what torch saves")
    if layer.lora_magnitude is None:
        return tuple(notes)
    if a.dropout_on == "both" and a.dropout:
        notes.append("dropout_on='both': a second base GEMM forward and backward; 'adapter' needs one")
    if keep == "output":
        notes.append("keep='output': no in-place op may follow the layer; y costs nothing where its consumer keeps it too")
    if keep == "inner":
        notes.append("keep='inner': z, as large as the output, is saved; 'recompute' trades it for one more GEMM")
    if keep == "recompute":
        notes.append("keep='recompute': one more base GEMM in backward")
    if a.axis == "in":
        notes.append("axis='in': gain⊙x is made in forward and again in backward, on the eager backend")
    return tuple(notes)
