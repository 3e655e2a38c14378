"""The file of a GPU's verdict: what its name holds, damage, and folders that cannot be written."""

import os

import pytest
import torch

from lorafast.engine import trial, trial_file
from lorafast.runtime import build_cache, devices

pytest.importorskip("triton")
GPU = torch.device("cuda", 0)


def why_not(kernel="project", dtype=torch.bfloat16, R=8):
    return trial.why_not(kernel, dtype, R, GPU)


def test_the_next_process_reads_the_file(gpu, capsys):
    first = trial.verdict(GPU)
    gpu.forget()
    capsys.readouterr()
    assert vars(trial.verdict(GPU)) == vars(first)
    assert len(gpu.runs) == 1
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("fact", ["gpu", "triton", "driver"])
def test_another_device_or_version_has_its_own_verdict(gpu, fact):
    why_not()
    gpu.facts[fact] = "another"
    gpu.forget()
    why_not()
    assert len(gpu.runs) == 2
    assert len(list(gpu.cache.glob("gpu-*.json"))) == 2


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"entries": {"streams": {"forms": {}}}}',
                '{"entries": {"streams": {"verdict": 1}}}', '{"entries": 3}'],
)  # fmt: skip
def test_a_damaged_file_is_told_and_replaced(gpu, capsys, content):
    why_not()
    gpu.file.write_text(content)
    gpu.forget()
    capsys.readouterr()
    assert why_not() == ""
    said = capsys.readouterr().err
    assert said.count("is damaged") == 1
    assert len(gpu.runs) == 2
    gpu.forget()
    assert why_not() == ""
    assert len(gpu.runs) == 2


def test_files_are_written_whole(gpu, monkeypatch):
    why_not()
    before = gpu.file.read_text()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    gpu.forget()
    monkeypatch.setenv("LORAFAST_TRIAL", "again")
    assert why_not() == ""
    assert gpu.file.read_text() == before
    assert sorted(path.suffix for path in gpu.cache.iterdir()) == [".json", ".lock"]


def test_an_unwritable_cache_gives_way_to_a_temporary_folder(gpu, monkeypatch, capsys, tmp_path):
    (tmp_path / "cache").write_text("no folder")
    private = tmp_path / "private"
    private.mkdir()
    monkeypatch.setattr(build_cache, "temporary_folder", lambda: private)
    assert why_not() == ""
    assert "cache cannot be used (File exists)" in capsys.readouterr().err
    gpu.forget()
    assert why_not() == ""
    assert len(gpu.runs) == 1
    assert [path.name for path in private.glob("gpu-*.json")] == [gpu.file.name]

    def none():
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(build_cache, "temporary_folder", none)
    gpu.forget()
    assert "neither can a temporary folder: Permission denied" in why_not()


def test_a_verdict_in_a_folder_that_cannot_be_written_is_read(gpu, monkeypatch):
    why_not()
    gpu.forget()
    monkeypatch.setattr(trial_file, "writable_folder", None)
    assert why_not() == ""


def test_the_key_has_every_fact(monkeypatch):
    class Properties:
        name, uuid = "H200", "GPU-7"

    module = type("Module", (), {"get_device_properties": lambda self, device: Properties})()
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    monkeypatch.setattr(devices, "of", lambda device: devices.Arch("nvidia", "sm_90", 132))
    gpu = trial.gpu_of.__wrapped__(GPU)
    assert (gpu.name, gpu.uuid) == ("H200", "GPU-7")
    assert gpu.facts["multiprocessors"] == "132"
    assert gpu.facts["torch"] == torch.__version__
    assert gpu.facts["triton"] == __import__("triton").__version__
    hashes = {gpu.sha16}
    for name in gpu.facts:
        hashes.add(trial.Gpu(gpu.facts | {name: "other"}, "").sha16)
    assert len(hashes) == 1 + len(gpu.facts)


def test_a_change_of_a_kernel_changes_the_key(monkeypatch, tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "project.py").write_text("one")
    (tmp_path / "philox.py").write_text("two")
    (tmp_path / "csrc" / "cuda").mkdir(parents=True)
    monkeypatch.setattr(trial, "_ENGINE", tmp_path)
    before = trial._sources.__wrapped__()
    for changed in ("kernels/project.py", "philox.py", "csrc/cuda/drop.cu", "csrc/cuda/mma.cuh"):
        (tmp_path / changed).write_text("another")
        after = trial._sources.__wrapped__()
        assert after != before
        before = after
