"""The device that is measured, a GPU that torch does not see, and the stored environment."""

import pytest
import torch

from lorafast.bench import cli, machine
from lorafast.bench.errors import BenchError


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Return a function that puts an nvidia-smi with this output and exit status on the path."""

    def put(output, status=0):
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\nprintf '{output}'\nexit {status}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return put


def test_a_gpu_that_torch_does_not_see_ends_the_bench(nvidia_smi, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    nvidia_smi("NVIDIA H200, 575.57\\n")
    out = tmp_path / "out.json"
    assert cli.main(["linear", "--json", str(out)]) == 2
    said = capsys.readouterr()
    why = f"torch {torch.__version__} is a build without CUDA"
    assert f"nvidia-smi sees NVIDIA H200, torch does not: {why}" in said.err
    assert "--device cpu measures the CPU all the same" in said.err
    assert not said.out
    assert not out.exists()
    with pytest.raises(BenchError, match=r"--device cuda: nvidia-smi sees NVIDIA H200"):
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


def test_the_cpu_is_measured_if_asked_for_or_without_a_gpu(nvidia_smi, monkeypatch):
    nvidia_smi("NVIDIA H200, 575.57\\n")
    assert machine.device("cpu") == torch.device("cpu")
    for output, status in (("", 0), ("no devices were found\\n", 6)):
        nvidia_smi(output, status)
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
def test_other_devices_are_an_error(asked, message, monkeypatch):
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BenchError, match=message):
        machine.device(asked)


def test_the_environment_has_versions_and_no_path(capsys):
    facts = machine.environment(torch.device("cpu"), "lorafast-bench env")
    assert facts["torch"] == torch.__version__
    expected = {"lorafast", "commit", "command", "time", "python", "peft", "cpu", "threads"}
    assert expected | {"memory_bytes"} <= set(facts)
    words = [value for value in facts.values() if isinstance(value, str)]
    assert not [value for value in words if value.startswith("/")]
    assert cli.main(["env", "--device", "cpu"]) == 0
    assert '"lorafast"' in capsys.readouterr().out


def test_a_processor_is_named_with_its_instruction_set_and_threads(monkeypatch):
    monkeypatch.setattr(machine, "_cpu", lambda: "AMD EPYC")
    monkeypatch.setattr(machine.instruction_sets, "available", lambda: ("avx2", "scalar"))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert machine.device_name(torch.device("cpu")) == "AMD EPYC (avx2), 1 thread"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert machine.device_name(torch.device("cpu")) == "AMD EPYC (avx2), 2 threads"
