"""The least flops and bytes of main memory that each primitive needs. Imports no triton.

The models assume kernels that read each large operand once. The bench compares its measurements
with them.
"""

from __future__ import annotations

from typing import NamedTuple

from lorafast.engine.problem import Problem


class Cost(NamedTuple):
    """The flops of a primitive (a multiply-add counts 2), and the bytes it reads and writes."""

    flops: int
    bytes: int


def project(p: Problem) -> Cost:
    """Return the cost of h = drop(x) Aᵀ and h_core: x read once, the factors, h and h_core."""
    e, R = p.dtype.itemsize, sum(p.R)
    h_core = 0 if p.core == "none" else p.M * R
    core_flops = {"none": 0, "diagonal": p.M * R, "full": 2 * p.M * sum(r * r for r in p.R)}[p.core]
    return Cost(
        2 * p.M * p.K * R + core_flops,
        e * (p.M * p.K + p.M * R + h_core) + p.factor_dtype.itemsize * R * p.K,
    )


def linear(p: Problem) -> Cost:
    """Return the cost of y = gain⊙(x Wᵀ + h_core Bᵀ) + bias: x, W, y, h_core and B."""
    e, N, R = p.dtype.itemsize, sum(p.N), sum(p.R)
    inner = e * p.M * N if p.keep == "inner" else 0
    return Cost(
        2 * p.M * N * (p.K + R),
        e * p.M * (p.K + N + R)
        + p.weight_dtype.itemsize * N * p.K
        + p.factor_dtype.itemsize * N * R
        + inner,
    )


def grad_output(p: Problem) -> Cost:
    """Return the cost of u, v, dB, d_core and the sums over tokens.

    dy is read once, and so is the kept y or z if a gain is trained; h_core is recomputed from h.
    """
    e, N, R = p.dtype.itemsize, sum(p.N), sum(p.R)
    kept = p.M * N if p.gain == "out" and p.keep != "none" else 0
    core_flops = {"none": 0, "diagonal": 4 * p.M * R, "full": 6 * p.M * sum(r * r for r in p.R)}[
        p.core
    ]
    return Cost(
        4 * p.M * N * R + core_flops + 2 * kept,
        e * (p.M * N + kept + 2 * p.M * R) + 2 * p.factor_dtype.itemsize * N * R,
    )


def grad_input(p: Problem) -> Cost:
    """Return the cost of dx = (gain⊙dy) W + mask⊙(v A): dy, W, dx, v and A."""
    e, N, R = p.dtype.itemsize, sum(p.N), sum(p.R)
    factors = p.factor_dtype.itemsize * R * p.K
    return Cost(
        2 * p.M * p.K * (N + R),
        e * p.M * (p.K + N + R) + p.weight_dtype.itemsize * N * p.K + factors,
    )


def grad_project(p: Problem) -> Cost:
    """Return the cost of dA = vᵀ drop(x): x read once."""
    e, R = p.dtype.itemsize, sum(p.R)
    return Cost(2 * p.M * p.K * R, e * p.M * (p.K + R) + p.factor_dtype.itemsize * R * p.K)


def row_norm(p: Problem) -> Cost:
    """Return the cost of ‖W + sBA‖: W read once."""
    N, R = sum(p.N), sum(p.R)
    norms = 4 * (p.K if p.gain == "in" else N)
    return Cost(
        2 * N * p.K * (R + 1),
        p.weight_dtype.itemsize * N * p.K + p.factor_dtype.itemsize * R * (N + p.K) + norms,
    )
