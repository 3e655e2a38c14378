"""lorafast.explain: what each adapted layer costs and which backend runs it, in words."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import NamedTuple

from torch import nn

from lorafast.engine import dispatch
from lorafast.engine.problem import (
    PRIMITIVES,
    CallOptions,
    GradMask,
    LayerTensors,
    Problem,
    resolved_keep,
    saves,
)
from lorafast.nn.adapter_layer import AdapterLayer
from lorafast.nn.embedding import Embedding
from lorafast.runtime import env, symlinks


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
            backend = (
                ", ".join(f"{p}: {b}" for p, b in row.backends.items())
                if len(used) > 1
                else "".join(used) or "-"
            )
            N, K = row.shape
            saved = "as torch" if row.saved is None else str(row.saved)
            lines.append(
                (
                    row.name,
                    row.method,
                    f"{N} x {K}",
                    str(row.r),
                    saved,
                    ", ".join(row.referenced) or "-",
                    backend,
                )
            )
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        remarks = {
            f"{name}: {'; '.join(why)}" for row in self.rows for name, why in row.why_not.items()
        }
        notes = {note for row in self.rows for note in row.notes}
        return "\n".join(
            table
            + [f"not {remark}" for remark in sorted(remarks)]
            + sorted(notes)
            + list(self.missing)
        )


class Call(NamedTuple):
    """What a training step asks of the op for one adapter of a layer: x and everything that trains get a gradient.

    keep and detach_norm as asked for. merged: the layer runs as a plain linear. elsewhere: why it runs on somebody else's forward.
    """

    method: str
    t: LayerTensors
    c: CallOptions
    keep: str = "auto"
    detach_norm: bool = True
    merged: bool = False
    elsewhere: str | None = None

    @property
    def plain(self) -> bool:
        """Whether no op of ours is called."""
        return self.merged or self.elsewhere is not None or self.t.weight.requires_grad

    def resolved(self) -> tuple[GradMask, CallOptions]:
        """The gradients asked for, and the settings with keep resolved."""
        trains = {
            name: part is not None and part.requires_grad for name, part in self.t._asdict().items()
        }
        trains |= {
            "x": True,
            "norm": not self.detach_norm and (trains["lora_A"] or trains["lora_B"]),
        }
        wants = GradMask(**{name: trains[name] for name in GradMask._fields})
        unbiased = self.t.bias is None and self.t.lora_bias is None
        trains_gain = self.t.magnitude is not None and wants.gain
        return wants, self.c._replace(
            keep=resolved_keep(self.keep, self.c, trains_gain, unbiased, self.t.weight.dtype)
        )


def explain(model: nn.Module, tokens: int = 2048) -> Explanation:
    """Every adapted layer of the model, and every adapter of a PEFT layer that accelerate() took: method, bytes saved per token,
    backend per primitive for calls of `tokens` rows, why not the others, and what its settings cost. Activations are taken to have
    the weight's dtype.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    missing = tuple(why for room in symlinks.LINKS if (why := symlinks.why_missing(room)))
    rows = (
        _row(name, call, tokens)
        for name, module in model.named_modules()
        for call in _calls(module)
    )
    return Explanation(tuple(rows), missing)


def _calls(module: nn.Module) -> list[Call]:
    if isinstance(module, AdapterLayer):
        a, t, c = module.adapter, module._tensors(), module._settings()
        c = c._replace(
            dropout=a.dropout, dropout_on=a.dropout_on, frozen_columns=module.frozen_columns
        )
        elsewhere = (
            "a lookup on plain torch, no product with the table"
            if isinstance(module, Embedding)
            else None
        )
        elsewhere = "disabled: the layer runs as its base" if module.disabled else elsewhere
        return [Call(type(a).__name__, t, c, a.keep, a.detach_norm, module.merged, elsewhere)]
    # A layer can be PEFT's and ours only once that room has been entered; PEFT takes seconds to import.
    peft = sys.modules.get("lorafast.integrations.peft_linear")
    return peft.explained(module) if peft and isinstance(module, peft.Linear) else []


def _row(name: str, call: Call, tokens: int) -> Row:
    t, (wants, c) = call.t, call.resolved()
    (N, K), R = t.weight.shape, t.lora_A.shape[0]
    kept, e = saves(wants, c, t.magnitude is not None), t.weight.element_size()
    saved, referenced = (
        (R * kept.h + N * kept.z) * e,
        [name for name in ("x", "y") if getattr(kept, name)],
    )
    backends, why_not, ways = {}, {}, []
    if call.plain:
        saved, referenced = (0 if call.merged else None), []
    else:
        problem = replace(Problem.of(t.weight.new_empty(0, K), t, c), M=tokens)
        for primitive in PRIMITIVES:
            if primitive != "row_norm" or t.magnitude is not None:
                asked = Problem.of_norm(t, c) if primitive == "row_norm" else problem
                backends[primitive], refusals = _route(primitive, asked)
                if (
                    way := dispatch.how(backends[primitive], primitive, asked)
                    if backends[primitive] != "none"
                    else None
                ):
                    ways.append(f"{primitive} by {backends[primitive]}: {way}")
                for other, why in refusals.items():
                    why_not[other] = tuple(dict.fromkeys(why_not.get(other, ()) + why))
    return Row(
        name or "(this layer)", call.method, (N, K), R, saved, tuple(referenced), backends, why_not, (*_notes(call, c), *ways)
    )  # fmt: skip


def _route(primitive: str, problem: Problem) -> tuple[str, dict[str, tuple[str, ...]]]:
    """The backend that serves a primitive ("none" if a forced one cannot), and why those asked before it do not."""
    refusals = {}
    for backend in dispatch.candidates(env.backend()):
        why = dispatch.why_not(backend, primitive, problem)
        if not why:
            return backend, refusals
        refusals[backend] = why
    return "none", refusals


def _notes(call: Call, c: CallOptions) -> tuple[str, ...]:
    notes = []
    if call.merged:
        notes.append("merged: the layer runs as a plain linear, and its adapter does not train")
    if call.elsewhere:
        return (*notes, call.elsewhere)
    if call.t.weight.requires_grad:
        notes.append(
            "weight.requires_grad: the layer runs on plain autograd, with what torch saves"
        )
    if call.t.magnitude is None:
        return tuple(notes)
    if c.drops_base:
        notes.append(
            "dropout_on='both': a second base GEMM forward and backward; 'adapter' needs one"
        )
    if c.keep == "output":
        notes.append(
            "keep='output': no in-place op may follow the layer; y costs nothing where its consumer keeps it too"
        )
    if c.keep == "inner":
        notes.append(
            "keep='inner': z, as large as the output, is saved; 'recompute' trades it for one more GEMM"
        )
    if c.keep == "recompute":
        notes.append("keep='recompute': one more base GEMM in backward")
    if c.axis == "in":
        notes.append(
            "axis='in': gain⊙x is made in forward and again in backward, on the eager backend"
        )
    return tuple(notes)
