"""What a trial measures: the time that the device takes, and not what it takes to launch it."""

import math
from types import SimpleNamespace

import pytest
import torch

from lorafast.engine import trial_rates
from lorafast.engine.trial_rates import _device_seconds

GPU = torch.device("cuda", 0)


class Gpu:
    """A GPU that does what is launched one after another, behind a host that takes its time."""

    def __init__(self, monkeypatch):
        self.host = self.device = 0.0
        monkeypatch.setattr(torch, "get_device_module", lambda device: self)
        clock = SimpleNamespace(perf_counter=lambda: self.host)
        monkeypatch.setattr(trial_rates, "time", clock)

    def launch(self, host, device):
        """Take some seconds of the host, then some of the device."""
        self.host += host
        self.device = max(self.device, self.host) + device

    def synchronize(self, device):
        self.host = max(self.host, self.device)

    def Event(self, enable_timing):
        return Event(self)


class Event:
    def __init__(self, gpu):
        self.gpu, self.at = gpu, math.nan

    def record(self):
        self.at = max(self.gpu.device, self.gpu.host)

    def synchronize(self):
        self.gpu.host = max(self.gpu.host, self.at)

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


@pytest.mark.parametrize(("host", "device"), [(200e-6, 17e-6), (5e-6, 3e-3), (1e-3, 1e-3)])
def test_what_python_takes_to_launch_is_not_counted(monkeypatch, host, device):
    gpu, busy = Gpu(monkeypatch), []

    def keep_busy(seconds):
        busy.append(seconds)
        gpu.launch(10e-6, seconds)

    found = _device_seconds(lambda: gpu.launch(host, device), GPU, keep_busy)
    assert found == pytest.approx(device)
    # Longer than the host takes for all that waits.
    assert min(busy) >= trial_rates._QUEUED * host
    # A device without a clock of its own is timed by the host's.
    by_host = trial_rates._seconds(lambda: gpu.launch(host, device), GPU)
    assert by_host >= max(host, device)


def test_a_device_is_kept_busy_by_as_many_products_as_it_takes(monkeypatch):
    made = []
    monkeypatch.setattr(torch, "mm", lambda a, b, out: made.append((a.shape, b.shape, out.shape)))
    busy = trial_rates._keeper(torch.float32, torch.device("cpu"), (4, 8, 2), 2 * 4 * 8 * 2 / 1e-3)
    busy(4.5e-3)
    assert made == [((4, 8), (8, 2), (4, 2))] * 5
    busy(1e9)
    assert len(made) == 5 + trial_rates._MOST_PRODUCTS
