"""The floor: the least ratio to the frozen step an adapted one can have here. Arithmetic on what was measured, no measurement."""

from __future__ import annotations

from typing import NamedTuple

from lorafast.engine.kernels import cost
from lorafast.engine.problem import Problem
from lorafast.runtime import devices
from lorafast.testing import Case


class Pass(NamedTuple):
    """Work beyond the two base products: flops, and the bytes of activations and weight it moves where those are a library's."""

    flops: int
    bytes: int


class Floor(NamedTuple):
    """Ratios to the frozen step. fused: everything in the base products' own kernels, so that flops alone count.

    beside: every pass on its own, beside a library's base products; None where the machine's bandwidth is not known.
    """

    fused: float
    beside: float | None


def floor(
    case: Case, trains_A: bool, device: str, frozen_ms: float | None, bandwidth: float | None
) -> Floor | None:
    """1 + the passes' time ÷ the frozen step's: flops at the rate the frozen step reaches, bytes at `bandwidth` a second.

    None without a frozen step, or of no tokens.
    """
    base = 4 * case.M * case.N * case.K
    if not base or not frozen_ms:
        return None
    extra, seconds = passes(case, trains_A, device), frozen_ms / 1e3
    fused = 1 + sum(one.flops for one in extra) / base
    if not bandwidth:
        return Floor(fused, None)
    return Floor(
        fused, 1 + sum(max(one.flops / base, one.bytes / bandwidth / seconds) for one in extra)
    )


def passes(case: Case, trains_A: bool, device: str) -> list[Pass]:
    """What an adapter adds to a step, operand by operand; what has R columns counts no bytes, for a cache holds it."""
    p, form, e = _problem(case, device), case.form, case.dtype.itemsize
    x, y, weight = e * case.M * case.K, e * case.M * case.N, e * case.N * case.K
    base = 2 * case.M * case.N * case.K
    # The library's product for dx takes gain⊙dy written out, or gain⊙W where that is less; d_magnitude reads the kept output.
    gained = y + min(y, 2 * weight) if form.magnitude else 0
    found = [
        Pass(cost.project(p).flops, x),
        Pass(cost.linear(p).flops - base, 2 * y),
        Pass(cost.grad_output(p).flops, y + gained),
        Pass(cost.grad_input(p).flops - base, 2 * x),
    ]
    if trains_A:
        found.append(Pass(cost.grad_project(p).flops, x))
    if form.magnitude:
        found.append(Pass(cost.row_norm(p).flops, weight))
    if form.magnitude and form.dropout_on == "both" and case.dropout:
        # The products of drop(x) in the correction of the base term: as long as the frozen ones, whatever they move.
        found.append(Pass(2 * base, 0))
    return found


def _problem(case: Case, device: str) -> Problem:
    form, factor = case.form, case.adapter_dtype or case.dtype
    return Problem(
        devices.Arch(device, device), case.dtype, case.M, case.K, (case.N,), (case.R,), case.dtype, factor, core=form.core,
        dropout=case.dropout, dropout_on=form.dropout_on, gain="out" if form.magnitude else "none",
        keep="output" if form.magnitude else "none", out_scale=form.out_scale,
    )  # fmt: skip
