"""low_rank_add in Triton's interpreter: the masked low-rank part of dx."""

import pytest
import torch
from helpers.triton_interpreter import DTYPES, SEED, P, dropped, strided, within_twice

from lorafast.engine.kernels.low_rank_add import low_rank_add
from lorafast.engine.problem import LowRankTerm


@pytest.mark.parametrize("accumulate", [True, False])
@pytest.mark.parametrize(
    ("M", "K", "R", "layout"),
    [(1, 72, 1, "sliced"), (65, 130, 8, "transposed"), (70, 33, 24, "contiguous")],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_low_rank_add(dtype, M, K, R, layout, accumulate):
    ours, eager, truth = [], [], []
    for _ in range(4):
        v, A, before = (
            strided(M, R, dtype, layout),
            strided(R, K, torch.float32, layout),
            torch.randn(M, K).to(dtype),
        )
        out = before.clone() if accumulate else torch.full_like(before, torch.nan)
        low_rank_add(out, LowRankTerm(v, A, SEED, P), accumulate)
        ours.append(out)
        for values, cast in ((eager, dtype), (truth, torch.float64)):
            part = dropped(v.to(cast) @ A.to(cast), P).to(cast)
            values.append(before.to(cast) + part if accumulate else part)
    within_twice(ours, eager, truth, dtype)


def test_no_rows():
    term = LowRankTerm(torch.empty(0, 2), torch.randn(2, 8), SEED, P)
    low_rank_add(torch.empty(0, 8), term, accumulate=True)
