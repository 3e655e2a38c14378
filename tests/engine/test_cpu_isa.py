"""The C++ kernels in every instruction set of this machine: bits, masks and edges."""

import os
import subprocess
import sys

import pytest
import torch
from helpers.cpp_compiler import ISAS, needs_compiler
from helpers.dropout_masks import ROWS, SEEDS, assert_dropped, assert_masks
from helpers.integer_problems import CHECKS, DTYPES, LAYOUTS
from helpers.nan_spread import assert_spreads

from lorafast.engine.backends import cpu
from lorafast.engine.guarded_allocations import GuardedAllocations
from lorafast.runtime import env

pytestmark = [needs_compiler, pytest.mark.usefixtures("few_tokens_by_op")]

# M, N, K, R: ends of 16 lanes, of 8 and of pairs; rows for every tile and one that is left.
SHAPES = [(1, 1, 1, 1), (7, 130, 257, 12), (25, 1049, 35, 9), (131, 19, 531, 5), (3, 33, 40, 101)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_numbers_to_the_bit(compiled, dtype):
    for turn, shape in enumerate(SHAPES):
        for check in CHECKS.values():
            check(cpu, DTYPES[dtype], torch.float32, *shape, LAYOUTS[turn])


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_written_or_read_beside(compiled, dtype):
    with GuardedAllocations() as guarded:
        for check in CHECKS.values():
            check(cpu, DTYPES[dtype], torch.bfloat16, 27, 139, 301, 11, "sliced")
            check(cpu, DTYPES[dtype], torch.bfloat16, 13, 71, 301, 11, "sliced")
    assert guarded.whole


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_shows_where_it_is_used_and_nowhere_else(compiled, dtype):
    assert_spreads(cpu, DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_primitive_drops_what_philox_drops(compiled, dtype):
    for p in (0.3, 0.999):
        assert_masks(cpu, torch.tensor(SEEDS[-1]), p, 19, 2063, DTYPES[dtype])
    for m0, K in ROWS:
        assert_dropped(torch.tensor(SEEDS[2]), m0, K, DTYPES[dtype])


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_every_number_there_is_is_rounded_as_torch_rounds_it(compiled, dtype):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(DTYPES[dtype]).view(256, 256)
    # As it is; into halves between two numbers, beyond the largest, below the least; and a NaN that
    # rounding must not carry over.
    gains = [
        torch.full((256,), gain)
        for gain in (1.0, 1.5, 0.7, 1 + 2**-8, 300.0, 2.0**-12, -(2.0**-15))
    ]
    for gain in (*gains, torch.full((256,), 2**31 - 1, dtype=torch.int32).view(torch.float32)):
        wide = x.float() * gain[:, None]
        exact, found = wide.to(x.dtype), cpu._scale(x, gain, by_row=True)
        # Below 1e-38, where fp32 has but subnormal numbers, the processor's own instructions for
        # bf16 give 0.
        same = (found == exact) | (found.isnan() & exact.isnan())
        if dtype == "bf16":
            same |= (wide.abs() < torch.finfo(torch.float32).tiny) & (found == 0)
        assert same.all()


@pytest.mark.parametrize("isa", ISAS)
def test_the_environment_forces_it(isa):
    probe = (
        "import lorafast; from lorafast.engine.backends import cpu; library = cpu.library()\n"
        "print(getattr(library, 'ISA', library))\n"
        "layer = lorafast.Linear(24, 32, adapter=lorafast.LoRA(r=4))\n"
        "print(lorafast.explain(layer, tokens=1 << 16))"
    )
    told = subprocess.run(
        [sys.executable, "-c", probe],
        env=os.environ | {env.CPU_ISA.name: isa},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    if told[0] != isa:
        pytest.skip(told[0])
    assert any("grad_output" in line and line.endswith(f" by cpu: {isa}") for line in told)
