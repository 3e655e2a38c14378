"""What each primitive must at least compute and move: flops and bytes of main memory. Imports no triton.

The models are those of kernels that read each large operand once; a bench sets them beside what it measures.
"""

from __future__ import annotations

from typing import NamedTuple

from lorafast.engine.problem import Problem


class Cost(NamedTuple):
    """flops (a multiply-add is 2), and bytes read and written."""

    flops: int
    bytes: int


def project(p: Problem) -> Cost:
    """h = drop(x) Aᵀ and h' = core(h): x once, the factors, h and h' out."""
    e, R = p.dtype.itemsize, sum(p.R)
    mixed = 0 if p.core == "none" else p.M * R
    mixing = {"none": 0, "diagonal": p.M * R, "full": 2 * p.M * sum(r * r for r in p.R)}[p.core]
    return Cost(
        2 * p.M * p.K * R + mixing,
        e * (p.M * p.K + p.M * R + mixed) + p.factor_dtype.itemsize * R * p.K,
    )


def linear(p: Problem) -> Cost:
    """y = gain⊙(x Wᵀ + h' Bᵀ) + bias: the base GEMM's operands and result, h' and B."""
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
    """u, v, dB, d_core and the sums over tokens: dy once, the kept y or z once where a gain trains; h' is made anew."""
    e, N, R = p.dtype.itemsize, sum(p.N), sum(p.R)
    kept = p.M * N if p.gain == "out" and p.keep != "none" else 0
    mixing = {"none": 0, "diagonal": 4 * p.M * R, "full": 6 * p.M * sum(r * r for r in p.R)}[p.core]
    return Cost(
        4 * p.M * N * R + mixing + 2 * kept,
        e * (p.M * N + kept + 2 * p.M * R) + 2 * p.factor_dtype.itemsize * N * R,
    )


def grad_input(p: Problem) -> Cost:
    """dx = (gain⊙dy) W + mask⊙(v A): the base GEMM transposed."""
    e, N, R = p.dtype.itemsize, sum(p.N), sum(p.R)
    factors = p.factor_dtype.itemsize * R * p.K
    return Cost(
        2 * p.M * p.K * (N + R),
        e * p.M * (p.K + N + R) + p.weight_dtype.itemsize * N * p.K + factors,
    )


def grad_project(p: Problem) -> Cost:
    """dA = vᵀ drop(x): x once."""
    e, R = p.dtype.itemsize, sum(p.R)
    return Cost(2 * p.M * p.K * R, e * p.M * (p.K + R) + p.factor_dtype.itemsize * R * p.K)


def row_norm(p: Problem) -> Cost:
    """‖W + sBA‖: W once."""
    N, R = sum(p.N), sum(p.R)
    norms = 4 * (p.K if p.gain == "in" else N)
    return Cost(
        2 * N * p.K * (R + 1),
        p.weight_dtype.itemsize * N * p.K + p.factor_dtype.itemsize * R * (N + p.K) + norms,
    )
