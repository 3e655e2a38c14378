"""LoRA-Pro's equations: the projection, the free X, and the first step."""

import itertools

import pytest
import torch
from helpers.optimizer_runs import projections

from lorafast.optim.lora_pro_steps import (
    X_CHOICES,
    decompose_pairs,
    equivalent_gradient,
    factor_gradients,
    solve_steps,
)

each_x = pytest.mark.parametrize("x", X_CHOICES)
TIGHT = {"rtol": 1e-9, "atol": 1e-10}


def factors(N=9, K=7, R=3, zero="", lacking="", s=1.7):
    """A, B, s and G in fp64; zero: factors that are 0. lacking: factors without their full rank."""
    A, B, G = (torch.randn(*shape, dtype=torch.float64) for shape in ((R, K), (N, R), (N, K)))
    if "A" in lacking:
        A[-1] = A[0] * 2
    if "B" in lacking:
        B[:, -1] = B[:, 0] - B[:, 1]
    return A * ("A" not in zero), B * ("B" not in zero), s, G


def steps(A, B, s, G, x):
    """The pair, g_A, g_B, g^A and g^B."""
    (pair,) = decompose_pairs([(A, B, s)])
    g_A, g_B = factor_gradients(pair, G)
    return pair, g_A, g_B, *solve_steps(pair, g_A, g_B, x)


CASES = [
    {},
    {"R": 1},
    {"N": 4, "K": 3, "R": 5},
    {"zero": "B"},
    {"zero": "A"},
    {"zero": "AB"},
    {"lacking": "A"},
    {"lacking": "B"},
    {"lacking": "AB"},
    {"s": torch.tensor(0.4, dtype=torch.float64)},
]
each_case = pytest.mark.parametrize("case", CASES, ids=str)


@each_x
@each_case
def test_the_equivalent_gradient_is_the_nearest(case, x):
    A, B, s, G = factors(**case)
    pair, g_A, g_B, step_A, step_B = steps(A, B, s, G, x)
    found = s * (B @ step_A + step_B @ A)
    torch.testing.assert_close(found, equivalent_gradient(pair, g_A, g_B), **TIGHT)
    P_B, P_A = projections(A, B)
    left = G - P_B @ G - G @ P_A + P_B @ G @ P_A
    torch.testing.assert_close(G - found, left, **TIGHT)
    # The residual is at right angles to all that the two factors could do.
    torch.testing.assert_close(B.t() @ (G - found), torch.zeros_like(A), **TIGHT)
    torch.testing.assert_close((G - found) @ A.t(), torch.zeros_like(B), **TIGHT)
    # And by brute force: least squares over every entry of both factors.
    if not case:
        rows = [
            (s * B @ E).reshape(-1)
            for E in torch.eye(A.numel(), dtype=A.dtype).reshape(-1, *A.shape)
        ]
        rows += [
            (s * E @ A).reshape(-1)
            for E in torch.eye(B.numel(), dtype=B.dtype).reshape(-1, *B.shape)
        ]
        basis = torch.stack(rows, 1)
        best = (basis @ (torch.linalg.pinv(basis, rtol=1e-10) @ G.reshape(-1))).reshape(G.shape)
        torch.testing.assert_close(found, best, **TIGHT)


def test_sylvesters_is_the_nearest_to_loras_own_gradients():
    A, B, s, G = factors()
    _, g_A, g_B, step_A, step_B = steps(A, B, s, G, "sylvester")

    def distance(D):
        return (
            (step_A + D @ A - g_A).square().sum() + (step_B - B @ D - g_B).square().sum()
        ).item()

    here, tiny = distance(torch.zeros(3, 3, dtype=torch.float64)), 1e-4
    for i, j in itertools.product(range(3), range(3)):
        D = torch.zeros(3, 3, dtype=torch.float64)
        D[i, j] = tiny
        assert abs(distance(D) - distance(-D)) / (2 * tiny) < 1e-7 * here
        assert distance(D) > here
    others = [steps(A, B, s, G, x)[3:] for x in ("zero", "symmetric")]
    assert all((a - g_A).square().sum() + (b - g_B).square().sum() > here for a, b in others)


def test_symmetric_halves_what_both_could_do():
    A, B, s, G = factors()
    P_B, P_A = projections(A, B)
    *_, step_A, step_B = steps(A, B, s, G, "symmetric")
    torch.testing.assert_close(s * B @ step_A, P_B @ G - P_B @ G @ P_A / 2, **TIGHT)
    torch.testing.assert_close(s * step_B @ A, G @ P_A - P_B @ G @ P_A / 2, **TIGHT)


@each_x
def test_the_first_step(x):
    A, B, s, G = factors(zero="B")
    _, g_A, g_B, step_A, step_B = steps(A, B, s, G, x)
    assert torch.equal(step_A, g_A)
    torch.testing.assert_close(step_B, g_B @ torch.linalg.inv(A @ A.t()) / s**2, **TIGHT)


def test_pairs_of_many_sizes_are_decomposed_as_each_alone():
    many = [factors(R=R)[:3] for R in (3, 2, 3, 1)] + [(*(f.float() for f in factors()[:2]), 1.0)]
    for pair, one in zip(decompose_pairs(many), many, strict=True):
        (alone,) = decompose_pairs([one])
        assert torch.equal(pair.A, one[0])
        assert pair.values_A.dtype == one[0].dtype
        torch.testing.assert_close(pair.values_B, alone.values_B)
        back = pair.vectors_B * pair.values_B @ pair.vectors_B.t()
        torch.testing.assert_close(back, one[1].t() @ one[1])
