"""Every test runs with poisoned allocations: what lorafast forgets to write is NaN. Triton kernels run in its interpreter."""

import os

os.environ["TRITON_INTERPRET"] = "1"
for name in ("LORAFAST_BACKEND", "LORAFAST_LOG", "LORAFAST_CPU_ISA"):
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
    from lorafast.integrations import peft_linear as ours

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


def pytest_terminal_summary(terminalreporter):
    """One table of what the compiled kernels take: forms, registers, stack, shared memory."""
    reports = [
        report
        for outcome in ("passed", "failed")
        for report in terminalreporter.getreports(outcome)
    ]
    rows = [
        row
        for report in reports
        for name, rows in report.user_properties
        if name == "compiled"
        for row in rows
    ]
    if not rows:
        return
    terminalreporter.section("Triton kernels compiled ahead of time")
    terminalreporter.line(
        f"{'kernel':16}{'dtype':7}{'arch':9}{'forms':>5}{'registers':>11}{'stack':>7}{'shared, KiB':>13}"
    )
    for dtype, capability, kernel in dict.fromkeys(tuple(row[:3]) for row in rows):
        registers, stack, shared = zip(
            *(row[3:] for row in rows if tuple(row[:3]) == (dtype, capability, kernel)), strict=True
        )
        terminalreporter.line(
            f"{kernel:16}{dtype:7}{f'sm_{capability}':9}{len(registers):5}{f'{min(registers)}-{max(registers)}':>11}{max(stack):7}"
            f"{f'{min(shared) / 1024:.0f}-{max(shared) / 1024:.0f}':>13}"
        )
    terminalreporter.line("Exempt from any rule: none.")
