"""lorafast.explain: what each adapted layer costs and which backend runs it, in words."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from torch import nn

from lorafast import dispatch, env, links
from lorafast.layer import Linear
from lorafast.problem import PRIMITIVES, Problem, Settings, Tensors, Wants, resolved_keep, saves


class Row(NamedTuple):
    """One adapted layer. saved: bytes per token kept for backward alone, None where plain autograd decides; referenced: what is
    kept that lives anyway.
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
            backend = ", ".join(f"{p}: {b}" for p, b in row.backends.items()) if len(used) > 1 else "".join(used) or "-"
            N, K = row.shape
            saved = "as torch" if row.saved is None else str(row.saved)
            lines.append((row.name, row.method, f"{N} x {K}", str(row.r), saved, ", ".join(row.referenced) or "-", backend))
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
    N, K = layer.weight.shape
    wants, t, c = _training_call(layer)
    kept, e = saves(wants, c, t.magnitude is not None), layer.weight.element_size()
    saved, referenced = (layer.r * kept.h + N * kept.z) * e, [name for name in ("x", "y") if getattr(kept, name)]
    backends, why_not = {}, {}
    if layer.merged or t.weight.requires_grad:
        saved, referenced = (0 if layer.merged else None), []
    else:
        problem = replace(Problem.of(t.weight.new_empty(0, K), t, c), M=tokens)
        for primitive in PRIMITIVES:
            if primitive != "row_norm" or t.magnitude is not None:
                asked = Problem.of_norm(t, c) if primitive == "row_norm" else problem
                backends[primitive], refusals = _route(primitive, asked)
                for other, why in refusals.items():
                    why_not[other] = tuple(dict.fromkeys(why_not.get(other, ()) + why))
    return Row(
        name or "(this layer)", type(layer.adapter).__name__, (N, K), layer.r, saved, tuple(referenced), backends, why_not,
        _notes(layer, c.keep),
    )  # fmt: skip


def _training_call(layer: Linear) -> tuple[Wants, Tensors, Settings]:
    """What a training step asks of the layer's op: x and everything that trains get a gradient."""
    a, t, c = layer.adapter, layer._tensors(), layer._settings()
    c = c._replace(dropout=a.dropout, dropout_on=a.dropout_on, frozen_columns=layer.frozen_columns)
    trains = {name: part is not None and part.requires_grad for name, part in t._asdict().items()}
    trains |= {"x": True, "norm": not a.detach_norm and (trains["lora_A"] or trains["lora_B"])}
    wants = Wants(**{name: trains[name] for name in Wants._fields})
    unbiased = t.bias is None and t.lora_bias is None
    keep = resolved_keep(a.keep, c, t.magnitude is not None and wants.gain, unbiased, t.weight.dtype)
    return wants, t, c._replace(keep=keep)


def _route(primitive: str, problem: Problem) -> tuple[str, dict[str, tuple[str, ...]]]:
    """The backend that serves a primitive ("none" if a forced one cannot), and why those asked before it do not."""
    refusals = {}
    for backend in dispatch.candidates(env.backend()):
        why = dispatch.why_not(backend, primitive, problem)
        if not why:
            return backend, refusals
        refusals[backend] = why
    return "none", refusals


def _notes(layer: Linear, keep: str) -> tuple[str, ...]:
    a, notes = layer.adapter, []
    if layer.merged:
        notes.append("merged: the layer runs as a plain linear, and its adapter does not train")
    if layer.weight.requires_grad:
        notes.append("weight.requires_grad: the layer runs on plain autograd, with what torch saves")
    if layer.lora_magnitude is None:
        return tuple(notes)
    if layer._settings()._replace(dropout=a.dropout, dropout_on=a.dropout_on).drops_base:
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
