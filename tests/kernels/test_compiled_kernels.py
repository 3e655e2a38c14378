"""Every Triton kernel compiles ahead of time, every tile in every form, dtype and architecture, and what comes out is lean.

What each takes is printed as a table after the tests.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lorafast.engine.kernels import configs

ROOT = Path(__file__).resolve().parents[2]
STREAMING = (
    "project",
    "finish",
    "grad_project",
    "grad_output",
    "finish_P",
    "masked_add",
    "factor",
    "row_norm",
)
GEMMS = ("gemm_tma", "gemm_pointers", "gemm_finish")
# What a block may have of shared memory, in bytes. sm_86 and sm_89, which take the way of sm_80, have less than it.
SHARED = {80: 101376, 90: 232448, 100: 232448}
# fp16's tiles are bf16's, and its code differs in the type of an operand: one architecture stands for all.
ASKED = [(dtype, capability) for dtype in ("bf16", "fp32") for capability in SHARED] + [
    ("fp16", 90),
    ("tf32", 90),
]
# Kernels without a product, and those that stream nothing through one.
PLAIN = ("finish_P", "factor", "gemm_finish")


@pytest.mark.parametrize("kernels", [GEMMS, STREAMING], ids=["gemm", "streaming"])
@pytest.mark.parametrize(("dtype", "capability"), ASKED)
def test_every_form_compiles_lean(dtype, capability, kernels, tmp_path, record_property):
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "TRITON_CACHE_DIR": str(tmp_path),
        "HOME": str(tmp_path),
    }
    command = [
        sys.executable,
        ROOT / "tests" / "helpers" / "compile_ahead.py",
        dtype,
        str(capability),
        *kernels,
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    built = [json.loads(line) for line in done.stdout.splitlines()]
    record_property(
        "compiled",
        [
            [dtype, capability, one["kernel"], one["reg"], one["stack"], one["shared"]]
            for one in built
        ],
    )
    by_tma = "16" in dtype and capability >= 90
    assert {one["kernel"] for one in built} == set(kernels) - (set() if by_tma else {"gemm_tma"})
    for one in built:
        clean = {"stack": 0, "local": 0, "atomics": 0}
        assert {name: one[name] for name in clean} == clean, one
        assert one["shared"] <= SHARED[capability], one
        if multiplies(one):
            assert one["tensor"] > 0, one
        if one["kernel"] == "gemm_tma":
            tile = one["tile"]
            assert one["tma_loads"] > 0, one
            # Room for every stage's operands at once: they arrive while others are multiplied.
            assert (
                one["shared"]
                >= tile["stages"] * 2 * (tile["BLOCK_M"] + tile["BLOCK_N"]) * tile["BLOCK_K"]
            ), one
        if one["kernel"] == "gemm_tma" and capability == 90:
            # A product still under way while the next one's operands arrive.
            assert one["wgmma"] > 0, one
            assert one["in_flight"] > 0, one
        if one["kernel"] == "gemm_pointers":
            assert one["async_loads"] > 0, one


def multiplies(one):
    """Whether a form has a product that tensor cores can do."""
    flags = one["flags"]
    precise = flags.get("PRECISION") == "ieee" and one["dtype"] == "fp32"
    # finish multiplies nothing but a core; grad_output may be asked for sums alone.
    return (
        one["kernel"] not in PLAIN
        and not precise
        and flags.get("CORE", 2) == 2
        and (flags.get("P", True) or flags["U"])
    )


def test_every_tile_of_ranks_is_compiled():
    for kernel in ("project", "finish", "grad_project", "grad_output", "finish_P", "row_norm"):
        for dtype in (torch.float32, torch.float16):
            assert {tile.BLOCK_R for tile in configs.tiles(kernel, dtype)} == set(configs.BLOCKS_R)
