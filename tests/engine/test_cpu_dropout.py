"""The C++ kernels drop what lorafast.engine.philox drops, for any row of an activation."""

import pytest
import torch
from helpers.cpp_compiler import needs_compiler
from helpers.dropout_masks import ROWS, SEEDS, assert_dropped, assert_masks
from helpers.integer_problems import DTYPES

from lorafast.engine import philox, plain_products
from lorafast.engine.backends import cpu
from lorafast.engine.problem import tokens

pytestmark = needs_compiler
# Groups of 8 that end anywhere in a vector, and more columns than any kernel draws bits for at
# once.
SHAPES = [(1, 1), (9, 7), (129, 65), (3, 1000), (50, 2056), (131, 519)]


@pytest.mark.parametrize("shape", SHAPES, ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("p", [0.05, 0.5, 0.999])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_primitive_drops_what_philox_drops(dtype, p, shape):
    for seed in SEEDS:
        assert_masks(cpu, torch.tensor(seed), p, *shape, DTYPES[dtype])


@pytest.mark.parametrize(("m0", "K"), ROWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_longer_activation(dtype, m0, K):
    for seed in SEEDS:
        assert_dropped(torch.tensor(seed), m0, K, DTYPES[dtype])


@pytest.mark.parametrize("shape", [*SHAPES, (2, 3, 17), (5,), (0, 4), (3, 0, 8)], ids=str)
@pytest.mark.parametrize("p", [1 / 65536, 0.05, 0.999])
def test_the_mask_alone(p, shape):
    x = torch.empty(shape)
    for seed in SEEDS:
        kept = philox.keep_mask(torch.tensor([seed]), p, slice(0, tokens(x)), shape[-1])
        assert torch.equal(plain_products._drop_mask(x, p, torch.tensor([seed])), ~kept.view(shape))
