"""The specification of a GPU: its own number of multiprocessors, rates, and when TMA is used."""

import importlib.metadata

import pytest
import torch

from lorafast.engine.kernels import configs, gpu_specs
from lorafast.engine.kernels.gpu_specs import DEVICES, device
from lorafast.runtime import devices
from lorafast.runtime.devices import Arch


def test_an_unknown_device_has_the_specification_of_sm_80():
    assert device(Arch("nvidia", "sm_87")) == device(Arch("cpu", "cpu")) == DEVICES["sm_80"]
    assert device(Arch("meta", "meta")) == DEVICES["sm_80"]


def test_a_gpu_counts_its_own_multiprocessors_and_its_rates_follow():
    whole, half = device(Arch("nvidia", "sm_90")), device(Arch("nvidia", "sm_90", 66))
    assert whole == device(Arch("nvidia", "sm_90", 132)) == DEVICES["sm_90"]
    assert half.multiprocessors == 66
    assert (2 * half.half_flops, 2 * half.full_flops) == (whole.half_flops, whole.full_flops)
    assert half.bandwidth == whole.bandwidth


@pytest.mark.parametrize("count", [60, 78, 114, 132])
def test_streams_split_into_two_programs_a_multiprocessor(count):
    """As nearly as splits of whole steps allow."""
    arch = Arch("nvidia", "sm_90", count)
    for split, blocks in (
        (configs.grad_project(65536, 1024, 16, torch.bfloat16, arch), 1024 // 128),
        (configs.grad_output(65536, 1024, 16, torch.bfloat16, arch, 0), 1024 // 128),
    ):
        assert 0.9 * 2 * count < split.splits * blocks <= 2 * count


def test_a_device_says_how_many_multiprocessors_it_has(monkeypatch):
    class Facts:
        major, minor, multi_processor_count, name = 9, 0, 114, "NVIDIA H100 PCIe"

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Facts)
    monkeypatch.setattr(torch.version, "hip", None)
    assert devices.of.__wrapped__(torch.device("cuda", 7)) == Arch(
        "nvidia", "sm_90", 114, "NVIDIA H100 PCIe"
    )
    assert devices.of(torch.device("cpu")).multiprocessors == 0
    assert devices.of(torch.device("meta")).multiprocessors == 0


@pytest.mark.parametrize(("version", "large"), [("3.6.0", False), ("3.7.1", True), ("4.0", True)])
def test_an_older_triton_makes_no_descriptors_on_blackwell(monkeypatch, version, large):
    """They may fail there for small tensors with gaps."""
    monkeypatch.setattr(importlib.metadata, "version", lambda package: version)
    gpu_specs.device.cache_clear()
    assert device(Arch("nvidia", "sm_90")).tma
    for name in ("sm_100", "sm_103"):
        assert device(Arch("nvidia", name)).tma == large
    monkeypatch.undo()
    gpu_specs.device.cache_clear()


def test_without_triton_its_version_is_none(monkeypatch):
    def missing(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert gpu_specs._triton_version() == (0, 0)
