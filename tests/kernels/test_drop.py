"""The kernel for dropout alone, in Triton's interpreter: bits, blocks of rows, strides, guards."""

import itertools

import pytest
import torch
from helpers.rotations import thinned
from helpers.triton_interpreter import DTYPES, SEED, far_apart, strided

from lorafast.engine import philox
from lorafast.engine.kernels.drop import drop

SHAPES = [(1, 1), (33, 130), (70, 8), (5, 771), (64, 256)]


@pytest.mark.parametrize(
    ("shape", "scaled", "dtype", "layout"),
    thinned(
        itertools.product(SHAPES, (True, False), DTYPES, ("contiguous", "sliced", "transposed"))
    ),
)
def test_drop_is_torchs_bit_for_bit(shape, scaled, dtype, layout):
    M, K = shape
    for seed, p in ((SEED, 0.3), (torch.tensor([2**63 - 2]), 1 / 65536), (torch.tensor([0]), 0.9)):
        x, out = strided(M, K, dtype, layout), torch.full((M + 2, K), 7.0, dtype=dtype)
        kept = philox.keep_mask(seed, p, slice(0, M), K)
        x.masked_fill_(~kept, torch.inf)
        drop(out[1:-1], x, seed, p, scaled=scaled)
        want = torch.where(kept, x * philox.scale(p) if scaled else x, 0.0)
        assert torch.equal(out[1:-1], want)
        assert (out[:: M + 1] == 7).all()


@pytest.mark.parametrize("first_row", [1, 2**31 - 9, 2**32 - 9, 2**40])
@pytest.mark.parametrize("K", [8, 100])
def test_rows_of_a_longer_activation(first_row, K):
    x, out = torch.randn(21, K).half(), torch.empty(21, K, dtype=torch.float16)
    drop(out, x, SEED, 0.3, first_row)
    kept = philox.keep_mask(SEED, 0.3, slice(first_row, first_row + 21), K)
    assert torch.equal(out, torch.where(kept, x * philox.scale(0.3), 0.0))


@pytest.mark.parametrize("accumulate", [True, False])
@pytest.mark.parametrize("out_dtype", DTYPES)
def test_a_masked_product_is_written_or_added(out_dtype, accumulate):
    for M, K in SHAPES:
        part, before = torch.randn(M, K), torch.randn(M, K + 3).to(out_dtype)
        kept = philox.keep_mask(SEED, 0.5, slice(0, M), K)
        out = before.clone() if accumulate else torch.full_like(before, torch.nan)
        drop(out[:, 1:-2], part, SEED, 0.5, accumulate=accumulate)
        # A scale of 2 rounds nothing, so the sum is rounded once, to out's dtype.
        want = torch.where(kept, part * 2, 0.0)
        want = want + before[:, 1:-2] if accumulate else want
        assert torch.equal(out[:, 1:-2], want.to(out_dtype))
        assert accumulate or out[:, [0, -2, -1]].isnan().all()


def test_rows_beyond_element_2_to_the_31(tmp_path):
    far, near = far_apart(tmp_path, 18, 16)
    outs = torch.empty(2, 18, 16, dtype=torch.float16)
    for x, out in zip((far, near), outs, strict=True):
        drop(out, x, SEED, 0.3)
    assert torch.equal(*outs)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)])
def test_nothing_to_drop(shape):
    drop(torch.empty(shape), torch.empty(shape), SEED, 0.3)
