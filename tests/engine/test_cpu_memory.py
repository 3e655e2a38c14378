"""The C++ kernels read and write inside their operands and outputs, in every dtype."""

import pytest
import torch
from helpers.cpp_compiler import needs_compiler
from helpers.integer_problems import CHECKS, DTYPES
from helpers.nan_spread import assert_spreads

from lorafast.engine.backends import cpu
from lorafast.engine.guarded_allocations import GuardedAllocations

pytestmark = [needs_compiler, pytest.mark.usefixtures("few_tokens_by_op")]


@pytest.mark.parametrize(
    "shape", [(7, 130, 257, 12), (65, 1030, 35, 5), (150, 33, 1025, 33)], ids="M{0[0]}".format
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("primitive", CHECKS)
def test_nothing_is_written_beside_outputs_and_workspaces(primitive, dtype, shape):
    with GuardedAllocations() as guarded:
        CHECKS[primitive](cpu, DTYPES[dtype], torch.float32, *shape, "sliced")
    assert guarded.whole


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_shows_where_it_is_used_and_nowhere_else(dtype):
    assert_spreads(cpu, DTYPES[dtype])
