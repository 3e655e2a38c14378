"""lorafast-bench trial: what it prints of a verdict, and its exit status."""

import json

import pytest
import torch
from helpers.pretended_gpu import Pretended

from lorafast.bench import cli, machine
from lorafast.bench import trial as command
from lorafast.engine import cuda_forms


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "device", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr(machine, "environment", lambda device, words: {"command": words})
    return Pretended(monkeypatch, tmp_path)


def test_a_right_verdict_is_a_table_and_is_read_the_next_time(gpu, capsys):
    for _ in range(2):
        assert cli.main(["trial"]) == 0
        said = capsys.readouterr().out
        assert "streams: tried in" in said
        assert "project bfloat16" in said
        assert "copy" in said
        assert "2.5e+12" in said
        gpu.forget()
    assert len(gpu.runs) == 1
    assert cli.main(["trial", "--again"]) == 0
    assert len(gpu.runs) == 2


def test_a_wrong_form_is_named_and_is_the_exit_status(gpu, capsys, tmp_path):
    gpu.does("grad_output float16=crash")
    file = tmp_path / "trial.json"
    assert cli.main(["trial", "--entries", "streams,fp32", "--json", str(file)]) == 1
    said = capsys.readouterr().out
    assert "crashed by SIGSEGV" in said
    content = json.loads(file.read_text())
    assert set(content["trial"]) == {"streams", "fp32"}
    assert content["trial"]["streams"]["forms"]["grad_output float16"] == "crashed by SIGSEGV"
    assert content["trial"]["fp32"]["rates"] == {"copy": 2.5e12}
    assert str(tmp_path) not in content["env"]["command"]


def test_both_sets_of_kernels_are_shown(gpu, capsys, monkeypatch):
    assert cli.main(["trial"]) == 0
    said = capsys.readouterr().out
    assert "cuda-bf16: not tried" in said
    assert "LORAFAST_HOST=0 is set" in said
    monkeypatch.setattr(cuda_forms, "why_not", lambda: "")
    gpu.does("cuda row_norm bfloat16=wrong")
    gpu.forget()
    assert cli.main(["trial"]) == 1
    said = capsys.readouterr().out
    assert "cuda-bf16: tried in" in said
    assert "cuda row_norm bfloat16" in said
    assert [run.split()[1] for run in gpu.runs] == ["streams", "cuda-bf16"]


def test_json_on_stdout_is_alone_there(gpu, capsys):
    assert cli.main(["trial", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["trial"]


def test_what_prevents_a_trial_is_one_line(gpu, capsys, monkeypatch):
    gpu.does("start=unusable")
    assert cli.main(["trial"]) == 2
    assert "could not be tried: the device is not visible" in capsys.readouterr().err
    monkeypatch.setattr(machine, "device", lambda name: torch.device("cpu"))
    assert cli.main(["trial"]) == 2
    assert "lorafast-bench trial: cpu: is tried on GPUs, and cpu is here" in capsys.readouterr().err
    assert command.all_right({})
