"""The host path over the `triton` backend: Python's launches, and on the emulator its bits."""

import functools
from unittest import mock

import pytest
import torch
from emulator.process import in_emulator
from helpers import host_on_triton
from helpers.cpp_compiler import needs_compiler
from helpers.host_path import assert_same_bits
from helpers.launch_arguments import any_route
from helpers.layer_cases import every_form
from helpers.random_layers import Draw
from helpers.triton_launches import chosen, step

from lorafast import testing
from lorafast.engine import host, masks, recipes
from lorafast.engine.kernels import gemm_routing, triton_internals
from lorafast.runtime import devices
from lorafast.testing import Case

pytestmark = [
    needs_compiler,
    pytest.mark.skipif(not triton_internals.enabled, reason="this Triton is not followed"),
]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Sums in parts, rows that are not aligned, several blocks of ranks, and one token.
SIZES = (
    (5, 8, 16, 1), (1, 40, 24, 4), (700, 264, 512, 16), (65, 130, 33, 24), (64, 72, 640, 140),
    (16, 72, 4104, 40),
)  # fmt: skip
LORA = Case(testing.FORMS[0], 33, 72, 136, 8, torch.bfloat16, 0.3)


def case_of(form, sizes):
    """A case of a form; dtype, dropout, bias and the weight's layout turn with form and sizes."""
    turn = testing.FORMS.index(form) + SIZES.index(sizes)
    case = Case(
        form, *sizes, DTYPES[turn % 3], (0.2, 0.0)[turn % 2], bias=turn % 4 < 2,
        transposed=turn % 5 == 0,
    )  # fmt: skip
    return case if case.works else Case(form, *sizes, DTYPES[turn % 3])


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@in_emulator
def test_the_launches_are_those_of_python(sizes):
    for capability, form in [(sm, form) for form in testing.FORMS for sm in (80, 90)]:
        case, pick = case_of(form, sizes), any_route(Draw(SIZES.index(sizes)))
        # TMA describes whole tensors alone.
        tensors = testing.make(case, sliced=testing.FORMS.index(form) % 2 > 0)
        with (
            mock.patch.object(gemm_routing, "pick", functools.cache(pick)),
            host_on_triton.on_gpu(capability) as cuda,
        ):
            by_python = step(case, tensors, cuda)
            address = host_on_triton.address_of(cuda.library.cuLaunchKernelEx)
            with host_on_triton.served_by_host(address) as calls:
                for _ in range(2):
                    assert step(case, tensors, cuda) == by_python
                calls.computed.clear()
                assert step(case, tensors, cuda) == by_python
        assert by_python
        assert calls.calls == [True] * 3
        assert calls.computed == [], case


CASES = [(sm, case, i % 3 < 2, i % 4 > 1) for i, sm, case in every_form(*DTYPES)]


@pytest.mark.parametrize(
    ("capability", "case", "fused", "sliced"),
    [*CASES[:1], *(pytest.param(*one, marks=pytest.mark.slow) for one in CASES[1:])],
    ids=str,
)
@in_emulator
def test_the_bits_are_those_of_python(capability, case, fused, sliced):
    tensors = testing.make(case, sliced=sliced)
    with host_on_triton.on_emulator(capability, fused) as address:
        theirs = testing.run(testing.ours, case, tensors)
        with host_on_triton.served_by_host(address) as calls:
            for _ in range(3):
                calls.computed.clear()
                assert_same_bits(testing.run(testing.ours, case, tensors), theirs)
            assert calls.computed == []
            # Other numbers, elsewhere in memory.
            tensors = testing.make(case, seed=1, sliced=sliced)
            ours = testing.run(testing.ours, case, tensors)
            assert calls.computed == []
        assert_same_bits(ours, testing.run(testing.ours, case, tensors))


@pytest.mark.parametrize("by_triton", [("project", "grad_project"), ("linear", "grad_input"), ()])
@pytest.mark.parametrize("masked_by", ["kernel", "torch"])
@in_emulator
def test_a_plan_with_eager_has_the_bits_of_python(by_triton, masked_by):
    why = "" if masked_by == "kernel" else "no"
    for form in (testing.FORMS[0], testing.FORMS[5]):
        case = Case(form, 33, 72, 136, 8, torch.float32, 0.3)
        tensors = testing.make(case)
        with (
            host_on_triton.on_emulator(80, True) as address,
            chosen(dict.fromkeys(by_triton, "triton")),
            mock.patch.object(masks, "why_not_kernel", return_value=why),
        ):
            theirs = testing.run(testing.ours, case, tensors)
            with host_on_triton.served_by_host(address) as calls:
                for _ in range(4):
                    calls.computed.clear()
                    assert_same_bits(testing.run(testing.ours, case, tensors), theirs)
        if not by_triton and masked_by == "torch":
            # Python makes the mask of two primitives once.
            assert calls.calls == [False] * 4
            continue
        assert calls.calls == [True] * 4
        # A mask by torch's operations reads a tensor that is kept between calls.
        drops = {"project", "grad_input", "grad_project"} if masked_by == "torch" else set()
        assert {name for name, _ in calls.computed} == drops - {*by_triton}


@in_emulator
def test_plans():
    tensors = testing.make(LORA)
    given = [tensors[name] for name in ("x", "weight", "lora_A", "lora_B")]

    def plan(backends, magnitude=None, p=0.3, x=given[0]):
        with chosen(backends):
            options = 1.0, p, "out", "adapter", "none"
            return host._plan(x, *given[1:], None, magnitude, None, *options)

    every = dict.fromkeys(recipes.PRIMITIVES, "triton")
    gain = torch.ones(72)
    with host_on_triton.on_gpu(90):
        whole = plan(every)
        assert whole & host.RECIPES
        assert whole >> host.MULTIPROCESSORS & 0xFFFF == 0
        by_cuda = every | {"grad_project": "cuda"}
        with mock.patch.object(host.cuda_kernels, "multiprocessors", return_value=132):
            mixed = plan(by_cuda)
            assert mixed >> host.MULTIPROCESSORS & 0xFFFF == 132
            assert plan(by_cuda, gain) & host.RECIPES
            # The gain is computed by one backend.
            assert plan(every | {"linear": "cuda"}, gain) == host.PYTHON
        assert mixed & host.RECIPES
        assert mixed ^ whole == 3 << recipes.ROUTES + 8 | 132 << host.MULTIPROCESSORS
        # Python makes the mask of two primitives once.
        shared = every | dict.fromkeys(("grad_input", "grad_project"), "eager")
        assert plan(shared) == host.PYTHON
        assert plan(shared, p=0.0) & host.RECIPES
        assert plan({}) == host.PYTHON
        assert plan({}, p=0.0) == host.RECIPES
        assert plan(every, x=given[0][:0]) == host.PYTHON
        amd = devices.Arch("amd", "gfx942")
        with mock.patch.object(devices, "of", return_value=amd):
            assert plan(every) == host.PYTHON


@in_emulator
def test_primitives_of_a_plan_that_cuda_serves():
    from lorafast.engine import cuda_forms

    tensors, noted = testing.make(LORA), []

    def loaded(form, device):
        return lambda grid, *arguments: noted.append(form.stem)

    with host_on_triton.on_gpu(90) as cuda, chosen({"project": "triton", "grad_project": "cuda"}):
        with mock.patch.object(cuda_forms, "loaded", loaded):
            by_python = step(LORA, tensors, cuda)
        assert "grad_project" in noted
        forms = []

        def function(form, device):
            forms.append(form.stem)
            kinds = {"p": "*i8", "q": "i64", "i": "i32", "f": "fp32"}
            letters = cuda_forms.KERNELS[form.stem].parameters
            cuda.tell_kinds(len(forms), [kinds[letter] for letter in letters])
            return len(forms)

        address = host_on_triton.address_of(cuda.library.cuLaunchKernelEx)
        with (
            mock.patch.object(cuda_forms, "function", function),
            host_on_triton.served_by_host(address) as calls,
        ):
            for _ in range(3):
                found = step(LORA, tensors, cuda)
    assert calls.calls == [True] * 3
    assert [one for one in found if one[0] >= 4096] == by_python
    assert [forms[one[0] - 1] for one in found if one[0] < 4096] == noted
