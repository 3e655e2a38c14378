"""The equations of LoRA-Pro (arXiv:2407.18242): g^A, g^B and g̃ of a pair of factors.

lorafast.optim.LoRAPro gives the equations and their notation.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from lorafast.engine.precision import accumulator
from lorafast.engine.problem import Scaling
from lorafast.optim.factors import inverse_squared_scaling

# The choices of the free matrix X.
X_CHOICES = ("sylvester", "zero", "symmetric")


class FactorPair(NamedTuple):
    """A [R, K], B [N, R] and s, with the eigendecompositions of BᵀB and AAᵀ.

    BᵀB = vectors_B·diag(values_B)·vectors_Bᵀ and AAᵀ = vectors_A·diag(values_A)·vectors_Aᵀ. An
    eigenvalue that is 0 up to rounding is set to 0.
    """

    A: torch.Tensor
    B: torch.Tensor
    scaling: Scaling
    values_B: torch.Tensor
    vectors_B: torch.Tensor
    values_A: torch.Tensor
    vectors_A: torch.Tensor


def decompose_pairs(factors: list[tuple[torch.Tensor, torch.Tensor, Scaling]]) -> list[FactorPair]:
    """Return a FactorPair for every (A, B, s), in fp32, or fp64 for fp64.

    Matrices of one size and dtype are decomposed in one call.
    """
    wide = [
        (A.detach().to(accumulator(A.dtype)), B.detach().to(accumulator(B.dtype)), s)
        for A, B, s in factors
    ]
    indices_by_form: dict[tuple[Any, ...], list[int]] = {}
    for i, (A, B, _) in enumerate(wide):
        indices_by_form.setdefault((A.shape[0], A.dtype, B.dtype, A.device), []).append(i)
    pairs: dict[int, FactorPair] = {}
    for indices in indices_by_form.values():
        grams_B = [wide[i][1].t() @ wide[i][1] for i in indices]
        grams_A = [wide[i][0] @ wide[i][0].t() for i in indices]
        grams = torch.stack(grams_B + grams_A)
        values, vectors = torch.linalg.eigh(grams)
        cut = values[:, -1:].clamp(min=0) * (torch.finfo(values.dtype).eps * grams.shape[-1])
        values = values.masked_fill(values <= cut, 0)
        for b, i in enumerate(indices):
            a = b + len(indices)
            pairs[i] = FactorPair(*wide[i], values[b], vectors[b], values[a], vectors[a])
    return [pairs[i] for i in range(len(wide))]


def solve_steps(
    pair: FactorPair, g_A: torch.Tensor, g_B: torch.Tensor, x: str = "sylvester"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return g^A [R, K] and g^B [N, R] of the class's equations, with the choice x of X."""
    A, B = pair.A, pair.B
    inverse_B = _pseudo_inverse(pair.values_B, pair.vectors_B)
    inverse_A = _pseudo_inverse(pair.values_A, pair.vectors_A)
    factor = inverse_squared_scaling(pair.scaling)
    step_A = (inverse_B @ g_A).mul_(factor)
    step_B = (g_B @ inverse_A).mul_(factor)
    step_B = torch.addmm(step_B, B, inverse_B @ (B.t() @ step_B), alpha=-1)
    if x == "zero":
        return step_A, step_B
    shared = step_A @ A.t()  # (1/s²) (BᵀB)⁺ g_A Aᵀ, the part that both factors can represent
    if x == "symmetric":
        X = (shared @ inverse_A).mul_(-0.5)
    else:
        # BᵀB X + X AAᵀ = -shared is a division in the two eigenbases, and 0 where the divisor is 0.
        sums = pair.values_B[:, None] + pair.values_A
        rotated = pair.vectors_B.t() @ shared @ pair.vectors_A
        solution = rotated.div_(sums).masked_fill_(sums == 0, 0)
        X = -(pair.vectors_B @ solution @ pair.vectors_A.t())
    return step_A.addmm_(X, A), step_B.addmm_(B, X, alpha=-1)


def equivalent_gradient(pair: FactorPair, g_A: torch.Tensor, g_B: torch.Tensor) -> torch.Tensor:
    """Return g̃ = s·B·g^A + s·g^B·A [N, K], as one product of rank 2R."""
    step_A, step_B = solve_steps(pair, g_A, g_B, "zero")
    return (torch.cat((pair.B, step_B), 1) * pair.scaling) @ torch.cat((step_A, pair.A))


def factor_gradients(pair: FactorPair, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return g_A = s·Bᵀ·g and g_B = s·g·Aᵀ of a gradient g [N, K]."""
    return (pair.B * pair.scaling).t() @ g, g @ (pair.A * pair.scaling).t()


def _pseudo_inverse(values: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    return (vectors * (1 / values).masked_fill(values == 0, 0)) @ vectors.t()
