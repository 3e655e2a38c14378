"""The dropout mask compiles ahead of time for every architecture, without spills."""

import subprocess
import sys
from pathlib import Path

import pytest

SLOW = pytest.mark.slow
# It runs in a process of its own, because pytest's process interprets kernels.
_COMPILE = """
import pathlib, re, subprocess, sys, tempfile
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from lorafast.engine.kernels.philox import keep_tile

@triton.jit
def kernel(seed_ptr, out_ptr, threshold, groups, BLOCK_M: tl.constexpr, GROUPS: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    kept = keep_tile(tl.load(seed_ptr), rows, tl.program_id(1) * GROUPS, groups, threshold, GROUPS)
    cols = tl.arange(0, GROUPS * 8)
    tl.store(out_ptr + rows[:, None] * groups * 8 + cols[None, :], kept.to(tl.int8))

signature = dict(
    seed_ptr="*i64", out_ptr="*i8", threshold="i32", groups="i32",
    BLOCK_M="constexpr", GROUPS="constexpr",
)
source = ASTSource(fn=kernel, signature=signature, constexprs=dict(BLOCK_M=64, GROUPS=8))
built = compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options=dict(num_warps=4))
tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
    file.write(built.asm["cubin"])
    file.flush()
    subprocess.run([tool, "--dump-resource-usage", file.name], check=True)
"""


@pytest.mark.parametrize(
    "capability", [pytest.param(80, marks=SLOW), 90, pytest.param(100, marks=SLOW)]
)
def test_philox_compiles_without_a_stack(capability, tmp_path):
    script = tmp_path / "compile_philox.py"
    script.write_text(_COMPILE)
    environment = {
        "PATH": "/usr/bin:/bin",
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),
        "HOME": str(tmp_path),
    }
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, script, str(capability)],
        capture_output=True,
        text=True,
        cwd=root,
        env=environment | {"PYTHONPATH": str(root)},
    )
    assert done.returncode == 0, done.stderr
    assert "STACK:0" in done.stdout, done.stdout
    assert "LOCAL:0" in done.stdout, done.stdout
