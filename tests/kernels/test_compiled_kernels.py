"""Every Triton kernel compiles ahead of time, in every tile, form, dtype and architecture.

The compiled code has no stack and no float atomics, and uses tensor cores and asynchronous loads. A
table of registers and shared memory is printed after the tests.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lorafast.engine.kernels import configs, gemm_routing
from lorafast.engine.kernels.gemm_routing import RouteQuery
from lorafast.runtime.devices import Arch

ROOT = Path(__file__).resolve().parents[2]
STREAMING = (
    "project",
    "project_finish",
    "grad_project",
    "grad_output",
    "grad_output_finish",
    "low_rank_add",
    "drop",
    "dequantise",
    "scale_cast",
    "row_norm",
)
GROUPED = (
    "grouped_project",
    "grouped_grad_project",
    "grouped_grad_output",
    "grouped_grad_output_finish",
    "grouped_low_rank_add",
    "grouped_drop",
    "grouped_gain",
    "add_blocks",
)
GEMMS = ("gemm_tma", "gemm_pointers", "gemm_finish")
# The bytes of shared memory that a block may use. The limit for sm_80 is that of sm_86 and sm_89:
# they use the same tiles and have less shared memory.
SHARED = {80: 101376, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
# fp16 has the tiles of bf16, and its code differs in the type of an operand only: one architecture
# stands for all.
CASES = [(dtype, capability) for dtype in ("bf16", "fp32") for capability in (80, 90, 100, 120)] + [
    ("fp16", 90),
    ("tf32", 90),
    ("tf32", 120),
]
# Architectures of which only the first form of each kernel is compiled.
OTHERS = (86, 89)
# The kernels without a matrix product.
NO_PRODUCT = (
    "grad_output_finish", "drop", "dequantise", "scale_cast", "gemm_finish",
    "grouped_grad_output_finish", "grouped_drop", "grouped_gain", "add_blocks",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "kernels", [GEMMS, STREAMING, GROUPED], ids=["gemm", "streaming", "grouped"]
)
@pytest.mark.parametrize(("dtype", "capability"), CASES)
def test_every_form_compiles_without_spills(dtype, capability, kernels, tmp_path, record_property):
    check_forms(dtype, capability, there(kernels, capability), tmp_path, record_property)


@pytest.mark.parametrize(
    "capability", [90, *(pytest.param(capability, marks=pytest.mark.slow) for capability in OTHERS)]
)
def test_the_first_form_of_each_kernel_compiles_without_spills(
    capability, tmp_path, record_property
):
    kernels = there(GEMMS + STREAMING + GROUPED, capability)
    check_forms("bf16", capability, kernels, tmp_path, record_property, "--first")


def there(kernels, capability):
    """The kernels that may serve on an architecture."""
    # sm_120 loads by TMA, too, and has too little shared memory for our tiles.
    return [one for one in kernels if (capability, one) != (120, "gemm_tma")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "capability"),
    [
        ("bf16", 89),
        ("fp16", 86),
        ("fp32", 120),
    ],
)
def test_the_mask_compiles_without_spills(dtype, capability, tmp_path, record_property):
    check_forms(dtype, capability, ("drop",), tmp_path, record_property)


def check_forms(dtype, capability, kernels, tmp_path, record_property, *options):
    """Compile kernels ahead of time, and check what became of each form."""
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "TRITON_CACHE_DIR": str(tmp_path),
        "HOME": str(tmp_path),
    }
    command = [
        sys.executable,
        ROOT / "tests" / "helpers" / "compile_ahead.py",
        *options,
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
            [dtype, capability, form["kernel"], form["reg"], form["stack"], form["shared"]]
            for form in built
        ],
    )
    by_tma = "16" in dtype and capability >= 90
    assert {form["kernel"] for form in built} == set(kernels) - (set() if by_tma else {"gemm_tma"})
    for form in built:
        clean = {"stack": 0, "local": 0, "atomics": 0}
        assert {name: form[name] for name in clean} == clean, form
        assert form["shared"] <= SHARED.get(capability, SHARED[80]), form
        if multiplies(form):
            assert form["tensor"] > 0, form
        if form["kernel"] == "gemm_tma":
            tile = form["tile"]
            assert form["tma_loads"] > 0, form
            # Shared memory holds the operands of all stages: some load while others are multiplied.
            assert (
                form["shared"]
                >= tile["stages"] * 2 * (tile["BLOCK_M"] + tile["BLOCK_N"]) * tile["BLOCK_K"]
            ), form
        if form["kernel"] == "gemm_tma" and capability == 90:
            # A product still runs while the operands of the next one load.
            assert form["wgmma"] > 0, form
            assert form["in_flight"] > 0, form
        if form["kernel"].endswith("grad_output") and (form["flags"]["U"] or form["flags"]["SUMS"]):
            # dy has several uses and no further copy: no product may read it beyond its step.
            assert form["pending"] == 0, form
        if form["kernel"] == "gemm_pointers":
            assert form["async_loads"] > 0, form


def multiplies(form):
    """True if a form has a product for which the dtype has tensor cores."""
    flags = form["flags"]
    precise = flags.get("PRECISION") == "ieee" and form["dtype"] == "fp32"
    # project_finish multiplies by a full core only; grad_output may compute the sums alone.
    return (
        form["kernel"] not in NO_PRODUCT
        and not precise
        and flags.get("CORE", 2) == 2
        and (flags.get("P", True) or flags["U"])
    )


def test_a_tile_of_one_architecture_is_in_the_place_of_another():
    """Of the tiles that need a stack on sm_120 none is launched there."""
    for name, replaced in (("sm_120", True), ("sm_121", True), ("sm_90", False)):
        arch = Arch("nvidia", name, 170)
        project = configs.project(1 << 14, 4096, 64, torch.bfloat16, arch).tile
        grad_output = [
            configs.grad_output(1 << 14, 4096, 128, torch.float32, arch, sums).tile
            for sums in (0, 1, 2)
        ]
        assert (32 if replaced else 64) == project.BLOCK_K
        assert [tile.BLOCK_N for tile in grad_output] == [32 if replaced else 64] * 3
        assert project in configs.tiles("project", torch.bfloat16, name)
        assert set(grad_output) <= {*configs.tiles("grad_output", torch.float32, name)}
        query = RouteQuery(1 << 14, 4096, (4096,), 16, torch.float32, arch)
        gemm = {route.tile for route in gemm_routing.candidates(query) if route.fused}
        assert max(tile.BLOCK_N for tile in gemm) == (64 if replaced else 128)


def test_every_block_of_ranks_is_compiled():
    for kernel in set(STREAMING) - {"low_rank_add", "drop", "dequantise", "scale_cast"}:
        for dtype in (torch.float32, torch.float16):
            assert {tile.BLOCK_R for tile in configs.tiles(kernel, dtype)} == set(configs.BLOCKS_R)
