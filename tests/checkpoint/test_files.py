"""Writing an adapter's folder: what is in it, and what a stopped save leaves."""

import contextlib
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers.adapter_folders import X, adapted_net, net
from safetensors.torch import load_file, save_file

import lorafast
from lorafast import DoRA, LoRA
from lorafast.checkpoint import files


def test_the_folder_holds_two_files_and_nothing_else(tmp_path):
    lorafast.save_adapter(adapted_net(LoRA(r=2)), tmp_path / "a" / "b")
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == [files.CONFIG, files.WEIGHTS]
    plain = tmp_path / "plain"
    plain.write_text("")
    assert {p.stat().st_mode for p in (tmp_path / "a" / "b").iterdir()} == {plain.stat().st_mode}


@pytest.mark.peft
@pytest.mark.parametrize("second", [LoRA(r=2, alpha=99), DoRA(r=2), LoRA(r=2)], ids=repr)
@pytest.mark.parametrize("theirs", [False, True])
def test_a_save_stopped_anywhere_leaves_the_old_adapter_or_the_new(
    second, theirs, tmp_path, monkeypatch
):
    """At every call that touches the disk the process ends, without any clean-up of ours."""
    old, new = adapted_net(LoRA(r=2)), adapted_net(second, seed=4)
    lorafast.save_adapter(old, tmp_path / "old")
    if theirs:  # a folder PEFT wrote knows nothing of our metadata
        weights = tmp_path / "old" / files.WEIGHTS
        save_file(load_file(weights), weights, metadata={"format": "pt"})
    lorafast.save_adapter(new, tmp_path / "new")
    outcomes = [(lorafast.load_adapter(net(), tmp_path / name)(X)) for name in ("old", "new")]
    seen = set()
    for stop in range(100):
        folder = tmp_path / f"at{stop}"
        shutil.copytree(tmp_path / "old", folder)
        calls = iter(range(1000))
        with monkeypatch.context() as patch:
            for owner, name in TOUCHES:
                patch.setattr(owner, name, _dying(getattr(owner, name), calls, stop))
            try:
                lorafast.save_adapter(new, folder)
            except _Died:
                pass
            else:
                break
        y = lorafast.load_adapter(net(), folder)(X)
        which = [torch.equal(y, outcome) for outcome in outcomes]
        assert any(which)
        seen.add(which.index(True))
        with contextlib.suppress(ImportError):
            _refused_or_whole_in_peft(folder, outcomes)
        lorafast.save_adapter(new, folder)
        assert torch.equal(lorafast.load_adapter(net(), folder)(X), outcomes[1])
        assert not [path.name for path in folder.iterdir() if path.suffix == ".old"]
    assert stop > 4
    assert seen == {0, 1}


TOUCHES = (
    *((os, "replace"), (os, "fsync"), (files, "save_file"), (shutil, "copymode")),
    *((pathlib.Path, "unlink"), (pathlib.Path, "write_bytes")),
)


class _Died(BaseException):
    """A kill as the code sees it: nothing after it runs, and nothing touches the disk any more."""


def _dying(function, calls, stop):
    def dying(*args, **kwargs):
        if next(calls) >= stop:
            raise _Died
        return function(*args, **kwargs)

    return dying


def _refused_or_whole_in_peft(folder, outcomes):
    import peft

    try:
        model = peft.PeftModel.from_pretrained(net(), folder)
    except ValueError as error:
        assert "adapter_config.json" in str(error)  # noqa: PT017
    else:
        assert any(torch.allclose(model(X), outcome, atol=1e-5) for outcome in outcomes)


def test_a_save_that_fails_cleans_up(tmp_path, monkeypatch):
    old, new = adapted_net(LoRA(r=2)), adapted_net(DoRA(r=2))
    lorafast.save_adapter(old, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    right = os.replace
    for name, failing in (
        ("fsync", full),
        ("replace", lambda a, b: full() if str(b).endswith(files.WEIGHTS) else right(a, b)),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, failing)
            with pytest.raises(OSError, match="No space"):
                lorafast.save_adapter(new, tmp_path)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_real_kill_leaves_a_whole_adapter(tmp_path):
    """A process that saves two adapters in turns is killed at random moments."""
    outcomes = []
    for i, adapter in enumerate((LoRA(r=2), DoRA(r=3))):
        lorafast.save_adapter(adapted_net(adapter), tmp_path / str(i))
        outcomes.append(lorafast.load_adapter(net(), tmp_path / str(i))(X))
    program = (
        "import sys, torch, lorafast; sys.path.insert(0, sys.argv[1])\n"
        "from helpers.adapter_folders import adapted_net\n"
        "from lorafast import LoRA, DoRA\n"
        "both = [adapted_net(LoRA(r=2)), adapted_net(DoRA(r=3))]\n"
        "lorafast.save_adapter(both[0], sys.argv[2]); print('ready', flush=True)\n"
        "while True:\n"
        "    for one in both: lorafast.save_adapter(one, sys.argv[2])\n"
    )
    tests = pathlib.Path(__file__).parents[1]
    randomly = random.Random(7)
    for _ in range(2):
        folder = tmp_path / "out"
        with subprocess.Popen(
            [sys.executable, "-c", program, tests, folder], stdout=subprocess.PIPE
        ) as process:
            assert process.stdout.readline() == b"ready\n"
            time.sleep(randomly.uniform(0, 0.05))
            process.send_signal(signal.SIGKILL)
        y = lorafast.load_adapter(net(), folder)(X)
        assert any(torch.equal(y, outcome) for outcome in outcomes)


def test_old_leavings_are_swept_and_young_ones_stay(tmp_path):
    for name, age in (("old", 7200), ("young", 0)):
        path = tmp_path / f".{files.WEIGHTS}.{name}.tmp"
        path.write_bytes(b"x")
        os.utime(path, (time.time() - age,) * 2)
    lorafast.save_adapter(adapted_net(LoRA(r=2)), tmp_path)
    assert [path.name for path in tmp_path.glob(".*")] == [f".{files.WEIGHTS}.young.tmp"]
