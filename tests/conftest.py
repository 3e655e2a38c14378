"""Every test runs with poisoned allocations: what lorafast forgets to write is NaN. Triton kernels run in its interpreter."""

import os

os.environ["TRITON_INTERPRET"] = "1"
for name in ("LORAFAST_BACKEND", "LORAFAST_LOG"):
    os.environ.pop(name, None)

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def poisoned_and_seeded():
    """torch.empty yields NaN, and the global generator starts alike in every test."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def calls(monkeypatch):
    """How often PEFT's layers ran on our ops, and why they did not."""
    from lorafast.models import peft as ours

    found = {"fast": 0, "why": []}
    fast, fallback = ours.fast, ours.fallback

    def counted(layer, x):
        found["fast"] += 1
        return fast(layer, x)

    def told(layer, why, *args, **kwargs):
        found["why"].append(why)
        return fallback(layer, why, *args, **kwargs)

    monkeypatch.setattr(ours, "fast", counted)
    monkeypatch.setattr(ours, "fallback", told)
    return found
