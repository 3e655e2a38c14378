"""The emulator sees barriers, waits and fences that are taken out of kernels with known answers."""

from collections import Counter

import pytest
import torch

from emulator import driver, kernels, mutants
from emulator.process import in_emulator

M, N, K = 70, 144, 272


def near(found, truth):
    """Return True if a product in bf16 is right."""
    error = (found.double() - truth).square().mean().sqrt()
    return bool(error <= 3e-3 * truth.square().mean().sqrt())


def product_by_pointers():
    """Return a function that multiplies by pointers."""
    a, b = torch.randn(M, K).bfloat16(), torch.randn(K, N).bfloat16()
    truth = a.double() @ b.double()

    def run():
        c = torch.empty(M, N, dtype=torch.bfloat16)
        kernels.product_kernel[(2, 3)](a, b, c, M, N, K, 64, 64, 32, num_stages=3)
        return near(c, truth)

    return run


def column_sums():
    """Return a function that sums columns."""
    a = torch.randn(64, N).bfloat16()
    truth = a.double().sum(0)

    def run():
        out = torch.empty(N)
        kernels.column_sums_kernel[(3,)](a, out, 64, N, 16, 64)
        return near(out, truth)

    return run


def product_by_tma():
    """Return a function that multiplies by descriptors."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    a, b = torch.randn(M, K).bfloat16(), torch.randn(K, N).bfloat16()
    truth = a.double() @ b.double()

    def run():
        c = torch.empty(M, N, dtype=torch.bfloat16)
        operands = [TensorDescriptor.from_tensor(t, [64, 64]) for t in (a, b, c)]
        kernels.tma_product_kernel[(2,)](
            *operands, M, N, K, False, 64, 64, 64, num_warps=8, num_stages=3
        )
        return near(c, truth)

    return run


RUNS = {
    "product_kernel": product_by_pointers,
    "column_sums_kernel": column_sums,
    "tma_product_kernel": product_by_tma,
}


@pytest.mark.parametrize(
    ("kernel", "capability", "always"),
    [
        ("product_kernel", 80, {"wait of cp.async"}),
        ("column_sums_kernel", 80, {"barrier"}),
        ("product_kernel", 90, {"wait of cp.async", "wait of wgmma", "fence"}),
        pytest.param(
            "tma_product_kernel",
            90,
            {"wait at an mbarrier", "expected bytes"},
            marks=pytest.mark.slow,
        ),
    ],
)
@in_emulator
def test_what_is_taken_out_is_missed(kernel, capability, always):
    """Some statements may go: barriers around a TMA stand in pairs, and a first commit has no use.

    always: the statements that may not.
    """
    with driver.emulating(capability):
        outcomes = mutants.tried(RUNS[kernel](), kernel, capability)
    total = Counter(one.statement for one in outcomes)
    seen = Counter(one.statement for one in outcomes if one.seen)
    assert always <= set(total)
    assert {name: seen[name] for name in always} == {name: total[name] for name in always}
    assert all(seen[name] for name in total), (total, seen)
