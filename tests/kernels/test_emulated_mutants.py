"""The emulator sees barriers, waits and fences that are taken out of our own kernels."""

from collections import Counter

import pytest
import torch
from emulator import mutants
from emulator.process import in_emulator
from helpers.emulated_device import emulated
from helpers.triton_interpreter import SEED

from lorafast.engine.backends import eager
from lorafast.engine.backends import triton as backend
from lorafast.engine.problem import DownProj, LowRankTerm

BF16 = torch.bfloat16


def project():
    """Return h of a down projection with dropout, as a function of the backend."""
    x, down = torch.randn(70, 784).to(BF16), DownProj(torch.randn(16, 784), None, SEED, 0.3)
    return lambda backend: backend.project(x, [down])[0][0]


def grad_project():
    """Return dA under dropout, as a function of the backend."""
    x, v = torch.randn(336, 144).to(BF16), torch.randn(336, 16).to(BF16)
    term = LowRankTerm(v, torch.empty(16, 144), SEED, 0.3)
    return lambda backend: backend.grad_project(x, [term])[0]


CALLS = {"project_kernel": project, "grad_project_kernel": grad_project}


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kernel", CALLS)
@in_emulator
def test_what_is_taken_out_is_missed(kernel, capability):
    """Some barriers may go: one before anything is written, and one of two in a row."""
    call = CALLS[kernel]()
    stock = call(eager)
    with emulated(capability):
        outcomes = mutants.tried(
            lambda: bool((call(backend) - stock).norm() <= 0.02 * stock.norm()), kernel, capability
        )
    total = Counter(one.statement for one in outcomes)
    seen = Counter(one.statement for one in outcomes if one.seen)
    assert {"barrier", "wait of cp.async"} <= set(total), total
    assert all(seen[name] for name in total), (total, seen)
    assert seen["barrier"] * 2 > total["barrier"], (total, seen)
