"""Which device is measured, and a GPU that nvidia-smi sees and torch does not."""

import pytest
import torch

from lorafast.bench import commands, machine, memory
from lorafast.bench.refusal import Refused


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Put an nvidia-smi on the path that says this and exits so."""

    def put(said, status=0):
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\nprintf '{said}'\nexit {status}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return put


def test_a_gpu_torch_does_not_see_stops_the_bench_with_the_reason(
    nvidia_smi, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(torch.version, "cuda", None)
    nvidia_smi("NVIDIA H200, 575.57\\n")
    out = tmp_path / "out.json"
    assert commands.main(["linear", "--json", str(out)]) == 2
    said = capsys.readouterr()
    assert (
        f"nvidia-smi sees NVIDIA H200, torch does not: torch {torch.__version__} is a build without CUDA"
        in said.err
    )
    assert "--device cpu measures the CPU all the same" in said.err
    assert not said.out
    assert not out.exists()
    with pytest.raises(Refused, match=r"--device cuda: nvidia-smi sees NVIDIA H200"):
        machine.device("cuda")


def test_a_build_for_a_newer_driver_is_named_with_both_versions(nvidia_smi, monkeypatch):
    def complain():
        raise RuntimeError("The NVIDIA driver on your system is too old\nmore")

    nvidia_smi("NVIDIA A100, 470.1\\n")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", complain)
    assert machine.unseen_gpu().endswith(
        "is built for CUDA 13.0, the driver is 470.1: The NVIDIA driver on your system is too old"
    )
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    assert machine.unseen_gpu().endswith("CUDA_VISIBLE_DEVICES may hide the GPU")


def test_the_cpu_is_measured_when_asked_or_when_there_is_no_gpu(nvidia_smi, monkeypatch):
    nvidia_smi("NVIDIA H200, 575.57\\n")
    assert machine.device("cpu") == torch.device("cpu")
    for said, status in (("", 0), ("no devices were found\\n", 6)):
        nvidia_smi(said, status)
        assert machine.unseen_gpu() is None
        assert machine.device(None) == torch.device("cpu")
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    assert machine.device(None) == torch.device("cpu")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("gpu", "must be cpu, cuda or cuda:INDEX"),
        ("meta", "measures cpu and cuda"),
        ("cuda", "neither does nvidia-smi"),
    ],
)
def test_other_devices_are_refused(asked, message, monkeypatch):
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(Refused, match=message):
        machine.device(asked)


def test_the_environment_names_versions_and_no_path(capsys, monkeypatch):
    facts = machine.environment(torch.device("cpu"), "lorafast-bench env")
    assert facts["torch"] == torch.__version__
    assert {
        "lorafast",
        "commit",
        "command",
        "time",
        "python",
        "peft",
        "cpu",
        "threads",
        "memory_bytes",
    } <= set(facts)
    assert not [
        value for value in facts.values() if isinstance(value, str) and value.startswith("/")
    ]
    assert commands.main(["env", "--device", "cpu"]) == 0
    assert '"lorafast"' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "is_oom"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"
            ),
            True,
        ),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_out_of_memory_is_known_by_what_it_says(error, is_oom):
    assert memory.is_out_of_memory(error) == is_oom
