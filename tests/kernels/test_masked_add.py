"""masked_add in Triton's interpreter: the dropped low-rank part of dx, first or after the base product."""

import pytest
import torch
from helpers.triton_interpreter import DTYPES, SEED, P, dropped, strided, within_twice

from lorafast.engine.kernels.masked_add import masked_add
from lorafast.engine.problem import LowRankTerm


@pytest.mark.parametrize("started", [True, False])
@pytest.mark.parametrize(
    ("M", "K", "R", "layout"),
    [(1, 72, 1, "sliced"), (65, 130, 8, "transposed"), (70, 33, 24, "contiguous")],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_add(dtype, M, K, R, layout, started):
    found, eager, truth = [], [], []
    for _ in range(4):
        v, A, before = (
            strided(M, R, dtype, layout),
            strided(R, K, torch.float32, layout),
            torch.randn(M, K).to(dtype),
        )
        out = before.clone() if started else torch.full_like(before, torch.nan)
        masked_add(out, LowRankTerm(v, A, SEED, P), started)
        found.append(out)
        for kept, cast in ((eager, dtype), (truth, torch.float64)):
            part = dropped(v.to(cast) @ A.to(cast), P).to(cast)
            kept.append(before.to(cast) + part if started else part)
    within_twice(found, eager, truth, dtype)


def test_nothing_to_add_to():
    masked_add(
        torch.empty(0, 8), LowRankTerm(torch.empty(0, 2), torch.randn(2, 8), SEED, P), started=True
    )
