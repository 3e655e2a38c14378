"""Every form of every CUDA kernel compiles, and leaves nothing of its numbers in memory."""

import re

import pytest
import torch
from helpers import cuda_compiler
from helpers.cuda_compiler import (
    ARCHS,
    KERNELS,
    NO_PRODUCT,
    forms,
)

from lorafast.engine import cuda_forms
from lorafast.engine.cuda_forms import ALIGNED, DROPS, SOURCES, Form, U
from lorafast.runtime import cuda_compiler as cuda_compiler_of_users
from lorafast.runtime.toolchain import Failure

# dtype, whether in tf32, the architecture, and how many forms there are for one that is compiled:
# fp16 has the forms of bf16 and differs in the type of an operand only.
CASES = [(torch.bfloat16, False, capability, 1) for capability in ARCHS]
CASES += [(torch.float32, False, 90, 1), (torch.float32, False, 80, 4)]
CASES += [(torch.float16, False, 90, 4), (torch.float32, True, 90, 4)]


def test_every_kernel_is_in_the_table():
    assert {path.stem for path in SOURCES.glob("*.cu")} == set(KERNELS) == set(cuda_forms.KERNELS)


@pytest.mark.slow
def test_the_tables_threads_are_those_of_the_kernels():
    forms = [Form(stem, torch.float32) for stem in KERNELS]
    forms += [Form("row_norm", torch.bfloat16), Form("row_norm", torch.bfloat16, 4)]
    for form in [*forms, Form("grad_output", torch.bfloat16, 2, U + ALIGNED + 4)]:
        text = cuda_compiler.ptx(form, 90)
        assert int(re.search(r"\.maxntid (\d+)", text).group(1)) == form.threads, form


def test_a_form_compiles_without_spills():
    check(Form("project", torch.bfloat16, 2, DROPS + ALIGNED), 90)


@pytest.mark.slow
@pytest.mark.parametrize("stem", KERNELS)
@pytest.mark.parametrize(("dtype", "tf32", "capability", "one_of"), CASES)
def test_every_form_compiles_without_spills(dtype, tf32, capability, one_of, stem):
    for form in forms(stem, dtype, tf32)[::one_of]:
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
    exact = form.dtype == torch.float32 and not form.tf32
    assert ("mma.sync" in text) != (no_product or exact), form


def test_nothing_of_the_host_is_included():
    """NVRTC has no headers of the host, nor those of the toolkit."""
    for path in [*SOURCES.glob("*.cu"), *SOURCES.glob("*.cuh")]:
        assert "#include <" not in path.read_text(), path.name


@pytest.mark.parametrize("stem", KERNELS)
def test_nvrtc_compiles_every_kernel(stem):
    try:
        nvrtc = cuda_compiler_of_users._nvrtc()
    except Failure as why:
        pytest.skip(str(why))
    form = forms(stem, torch.bfloat16)[-1]
    assert nvrtc.compile(SOURCES / f"{stem}.cu", "sm_90", form.options)[:4] == b"\x7fELF"
