"""Every form of every CUDA kernel compiles, and leaves nothing of its numbers in memory."""

import re

import pytest
from helpers import cuda_compiler
from helpers.cuda_compiler import (
    ALIGNED,
    ARCHS,
    DROPS,
    KERNELS,
    NO_PRODUCT,
    SOURCES,
    Form,
    forms,
)

# fp16 has the forms of bf16, and differs in the type of an operand only.
CASES = [("bf16", capability) for capability in ARCHS]
CASES += [("fp16", 90), ("fp32", 80), ("fp32", 90), ("tf32", 90)]


def test_every_kernel_is_in_the_table():
    assert {path.stem for path in SOURCES.glob("*.cu")} == set(KERNELS)


def test_a_form_compiles_without_spills():
    check(Form("project", "bf16", 2, DROPS + ALIGNED), 90)


@pytest.mark.slow
@pytest.mark.parametrize("stem", KERNELS)
@pytest.mark.parametrize(("dtype", "capability"), CASES)
def test_every_form_compiles_without_spills(dtype, capability, stem):
    for form in forms(stem, dtype):
        check(form, capability)


def check(form, capability):
    """Assert that a form has no stack and no atomics, and uses tensor cores where it multiplies."""
    used = cuda_compiler.usage(form, capability)
    assert used.registers > 0, (form, used)
    assert used.stack == used.spills == 0, (form, used)
    text = cuda_compiler.ptx(form, capability)
    assert not re.search(r"\b(atom|red)\.|\.local\b", text), form
    # A full core of more than 64 ranks is multiplied by project.
    no_product = form.stem in NO_PRODUCT or (form.stem == "project_finish" and form.tiles > 8)
    exact = form.dtype == "fp32" and not form.tf32
    assert ("mma.sync" in text) != (no_product or exact), form


def test_nothing_of_the_host_is_included():
    """NVRTC has no headers of the host, nor those of the toolkit."""
    for path in [*SOURCES.glob("*.cu"), *SOURCES.glob("*.cuh")]:
        assert "#include <" not in path.read_text(), path.name
