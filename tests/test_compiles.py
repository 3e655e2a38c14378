"""Every tile of every Triton kernel compiles ahead of time: no spills, no stack, shared memory within limits, no float atomics."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lorafast.kernels import configs

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ("project", "finish", "grad_project", "row_norm")
# What a block may have of shared memory, in bytes.
SHARED = {80: 166912, 90: 232448, 100: 232448}
# Every form on the architecture we mean first, on the others the one of each tile that has the most in it.
ASKED = (("bf16", 90, ()), ("fp32", 90, ()), ("fp16", 90, ("heaviest",)), ("bf16", 80, ("heaviest",)), ("bf16", 100, ("heaviest",)))


@pytest.mark.parametrize(("dtype", "capability", "which"), ASKED)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_tile_compiles_lean(kernel, dtype, capability, which, tmp_path):
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path), "HOME": str(tmp_path)}
    command = [sys.executable, ROOT / "tests" / "aot.py", kernel, dtype, str(capability), *which]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    built = [json.loads(line) for line in done.stdout.splitlines()]
    assert {one["tile"]["BLOCK_R"] for one in built} == set(configs.BLOCKS_R)
    for one in built:
        lean = {"stack": 0, "local": 0, "spills": 0, "atomics": 0}
        assert {name: one[name] for name in lean} == lean, one
        assert one["shared"] <= SHARED[capability], one
        # fp32 in full precision has no tensor cores, and finish multiplies nothing but a core.
        multiplies = kernel != "finish" or one["flags"]["CORE"] == 2
        if multiplies and (dtype != "fp32" or one["flags"]["PRECISION"] == "tf32"):
            assert one["tensor"] > 0, one
