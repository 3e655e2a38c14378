"""The lower bound of an adapted step's time over the frozen step's: computed, not measured."""

from __future__ import annotations

from typing import NamedTuple

from lorafast.engine.kernels import cost
from lorafast.engine.problem import Problem
from lorafast.runtime import devices
from lorafast.testing import Case


class Pass(NamedTuple):
    """Work beyond the two base products: flops, and bytes of activations and weight it moves."""

    flops: int
    bytes: int


class LowerBound(NamedTuple):
    """Ratios to the frozen step that no implementation of this kind is below.

    fused: all added work is part of the base products' kernels, so that only flops count.
    separate: each added pass runs on its own next to a library's base products; None if the
    machine's bandwidth is unknown.
    """

    fused: float
    separate: float | None


def lower_bound(
    case: Case, trains_A: bool, device: str, frozen_ms: float | None, bandwidth: float | None
) -> LowerBound | None:
    """Return 1 + the time of the added passes / the frozen step's time.

    Flops count at the rate that the frozen step reaches, bytes at `bandwidth` per second. None
    without a frozen step or without tokens.
    """
    base = 4 * case.M * case.N * case.K
    if not base or not frozen_ms:
        return None
    added, seconds = added_passes(case, trains_A, device), frozen_ms / 1e3
    fused = 1 + sum(work.flops for work in added) / base
    if not bandwidth:
        return LowerBound(fused, None)
    shares = (max(work.flops / base, work.bytes / bandwidth / seconds) for work in added)
    return LowerBound(fused, 1 + sum(shares))


def added_passes(case: Case, trains_A: bool, device: str) -> list[Pass]:
    """Return the passes that an adapter adds to a step.

    Tensors with R columns count as no bytes, because a cache holds them.
    """
    p, form, e = _problem(case, device), case.form, case.dtype.itemsize
    x, y, weight = e * case.M * case.K, e * case.M * case.N, e * case.N * case.K
    base = 2 * case.M * case.N * case.K
    # A library's product for dx needs gain⊙dy in memory, or gain⊙W where that is smaller, and
    # d_magnitude reads the saved output.
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
        # The two products of drop(x) that correct the base term have the frozen products' flops.
        found.append(Pass(2 * base, 0))
    return found


def _problem(case: Case, device: str) -> Problem:
    form, factor = case.form, case.adapter_dtype or case.dtype
    return Problem(
        devices.Arch(device, device),
        case.dtype,
        case.M,
        case.K,
        (case.N,),
        (case.R,),
        case.dtype,
        factor,
        core=form.core,
        dropout=case.dropout,
        dropout_on=form.dropout_on,
        gain="out" if form.magnitude else "none",
        keep="output" if form.magnitude else "none",
        out_scale=form.out_scale,
    )
