"""Every script in examples/ runs as it stands, on its own and without a network."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import lorafast

ROOT = Path(lorafast.__file__).resolve().parent.parent
# What each script prints when it has done what it is for.
PRINTS = {
    "accelerate_peft_model": "14 of 14 PEFT layers run on lorafast",
    "finetune_plain_loop": "saved and loaded: outputs are equal: True",
    "finetune_trainer": "3, 4, 5 continues as [6, 7, 8, 9, 10]",
    "lamda_schedule": "16 of 16 columns frozen, 512 numbers train",
    "merge_and_export": "merged into ['Linear', 'GELU', 'Linear']",
}


def run(name, folder):
    """The finished process of one script, run in a folder of its own."""
    folder.mkdir()
    settings = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, ROOT / "examples" / f"{name}.py"],
        cwd=folder,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
@pytest.mark.peft
def test_examples_run(tmp_path):
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == set(PRINTS)
    # Two at a time: most of their time is importing.
    with ThreadPoolExecutor(2) as pool:
        processes = list(pool.map(lambda name: run(name, tmp_path / name), PRINTS))
    for name, process in zip(PRINTS, processes, strict=True):
        assert process.returncode == 0, process.stderr
        assert PRINTS[name] in process.stdout
        assert not list((tmp_path / name).iterdir()), f"{name} leaves files behind"
