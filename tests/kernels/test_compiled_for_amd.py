"""The Triton kernels compile ahead of time for AMD's GPUs: without float atomics, within their
shared memory, and with their matrix instructions.

Nothing spills on gfx9. On gfx11 and gfx12, which have fewer registers for a thread, the largest
tiles do: that costs time, which a trial measures.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lorafast.engine import trial
from lorafast.engine.kernels import launch
from lorafast.runtime import devices
from lorafast.runtime.devices import Arch

ROOT = Path(__file__).resolve().parents[2]
KERNELS = (
    "project", "project_finish", "grad_project", "grad_output", "grad_output_finish",
    "low_rank_add", "drop", "dequantise", "scale_cast", "gemm_pointers", "gemm_finish", "row_norm",
)  # fmt: skip
# One architecture of each name that the backend admits, and the shared memory of a block.
SHARED = {"gfx90a": 65536, "gfx942": 65536, "gfx950": 163840, "gfx1100": 65536, "gfx1201": 65536}
# The kernels without a matrix product.
NO_PRODUCT = ("grad_output_finish", "drop", "dequantise", "scale_cast", "gemm_finish")


def compile_forms(arch, folder, *options, dtype="bf16"):
    """Return a record of each form, compiled in a process of its own."""
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "TRITON_CACHE_DIR": str(folder),
        "HOME": str(folder),
    }
    program = ROOT / "tests" / "helpers" / "compile_ahead.py"
    done = subprocess.run(
        [sys.executable, program, *options, dtype, arch, *KERNELS],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def assert_clean(forms, arch):
    """Assert what holds of every form."""
    for form in forms:
        assert form["atomics"] == 0, form
        if arch.startswith("gfx9"):
            assert (form["stack"], form["spills"]) == (0, 0), form
        assert form["shared"] <= SHARED[arch], form
        core = form["flags"].get("CORE", 2) == 2
        sums_alone = not form["flags"].get("P", True) and not form["flags"].get("U", True)
        # row_norm's factors are fp32, for which not every architecture has matrix instructions.
        full = form["dtype"] == "fp32" or form["kernel"] == "row_norm"
        if not full and form["kernel"] not in NO_PRODUCT and core and not sums_alone:
            assert form["tensor"] > 0, form


def test_every_architecture_that_is_admitted_is_compiled():
    assert all(name.startswith(trial.ARCHS["amd"]) for name in SHARED)
    assert all(any(name.startswith(one) for name in SHARED) for one in trial.ARCHS["amd"])


@pytest.mark.parametrize(
    ("arch", "dtype"),
    [
        ("gfx942", "bf16"),
        *(
            pytest.param(arch, "bf16", marks=pytest.mark.slow)
            for arch in SHARED
            if arch != "gfx942"
        ),
        pytest.param("gfx942", "fp32", marks=pytest.mark.slow),
    ],
)
def test_the_first_form_of_each_kernel_compiles(arch, dtype, tmp_path):
    forms = compile_forms(arch, tmp_path, "--first", dtype=dtype)
    assert [form["kernel"] for form in forms] == list(KERNELS)
    assert_clean(forms, arch)


@pytest.mark.parametrize(
    ("arch", "precision"),
    [
        (Arch("amd", "gfx942"), "tf32"),
        (Arch("amd", "gfx1100"), "ieee"),
        (Arch("nvidia", "sm_90"), "tf32"),
        (Arch("cpu", "cpu"), "tf32"),
    ],
)
def test_row_norm_asks_for_tf32_where_there_is_any(monkeypatch, arch, precision):
    monkeypatch.setattr(devices, "of", lambda device: arch)
    assert launch.tf32_if_any(torch.empty(1)) == precision
