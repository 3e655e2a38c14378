"""Adapters to put on the transformers of tiny_transformers, and how close logits must be."""

import pytest
import torch

from lorafast import DoRA, LaMDA, LoRA, PiSSA, VeRA

ADAPTERS = [
    LoRA(r=4, alpha=8),
    DoRA(r=4),
    LoRA(r=4, init=PiSSA()),
    DoRA(r=4, init=PiSSA()),
    LaMDA(r=4),
    VeRA(r=8),
]
DTYPES = [torch.float32, torch.bfloat16]


def each_adapter(*kinds):
    """Parametrize a test over adapters and kinds of transformers; the dtypes take turns."""
    values = [
        (adapter, kind, DTYPES[(i + j) % 2])
        for i, adapter in enumerate(ADAPTERS)
        for j, kind in enumerate(kinds)
    ]
    return pytest.mark.parametrize(("adapter", "kind", "dtype"), values, ids=str)


def assert_close(found, want, dtype, times=1):
    """Compare logits of models of which one has weights that were rounded `times` more often."""
    bound = times * {torch.float32: 1e-6, torch.bfloat16: 2**-7}[dtype] * float(want.abs().max())
    torch.testing.assert_close(found, want, rtol=0, atol=bound)
