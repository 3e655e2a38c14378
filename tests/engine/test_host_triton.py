"""The host path over the `triton` backend: Python's launches, and on the emulator its bits."""

import contextlib
import ctypes
import functools
import os
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch
from emulator.process import in_emulator
from helpers import host_on_triton
from helpers.cpp_compiler import needs_compiler
from helpers.host_path import assert_same_bits
from helpers.launch_arguments import any_route, followed_or_changed
from helpers.layer_cases import every_form
from helpers.random_layers import Draw

import lorafast
from lorafast import functional, testing
from lorafast.engine import dispatch, host, masks, plain_products, recipes, row_blocks
from lorafast.engine.kernels import gemm_routing, triton_internals
from lorafast.runtime import cuda_driver, devices, extension
from lorafast.runtime.toolchain import Failure
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


def launches(cuda, given):
    """What has been launched; of an address, what it lies in: a given tensor, or what was made."""
    spans = {
        name: (tensor.data_ptr(), tensor.data_ptr() + tensor.untyped_storage().nbytes())
        for name, tensor in given.items()
        if tensor is not None
    }

    def told(address):
        for name, (begin, end) in spans.items():
            if begin <= address < end:
                return name, address - begin
        return "made", address % 16

    found = []
    for function, sizes, values in cuda.launches():
        words = []
        for kind, value in zip(cuda.kinds[function], values, strict=True):
            # The stand-in for a tensor map has the address as its third word.
            at = {"*": 0, "nvTmaDesc": 16}.get(kind if kind == "nvTmaDesc" else kind[0])
            if at is not None:
                address = int.from_bytes(value[at : at + 8], "little")
                words.append((told(address), value[:at], value[at + 8 :]))
            else:
                words.append(value)
        found.append((function, sizes, words))
    return found


def step(case, tensors, cuda, function=testing.ours):
    """The launches of a step."""
    given = {}

    def ours(case, t):
        given.update(t)
        return function(case, t)

    cuda.noted()
    testing.run(ours, case, tensors)
    return launches(cuda, given)


@contextlib.contextmanager
def served(capability=90):
    """A context in which C++ launches by a driver that runs nothing: it gives CUDA and a Served."""
    with host_on_triton.on_gpu(capability) as cuda:
        address = host_on_triton.address_of(cuda.library.cuLaunchKernelEx)
        with host_on_triton.served_by_host(address) as calls:
            yield cuda, calls


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


@contextlib.contextmanager
def chosen(backends):
    """A context in which `auto` takes these backends of primitives, and eager for the others."""

    def refusing(backend):
        return lambda primitive, problem: () if backends.get(primitive) == backend else ("no",)

    with contextlib.ExitStack() as stubs:
        stubs.enter_context(mock.patch.dict(os.environ, {"LORAFAST_BACKEND": "auto"}))
        # No call is of so few tokens that torch's own products serve in Python.
        for most in ("MOST_ELEMENTS", "MOST_ELEMENTS_COPIED"):
            stubs.enter_context(mock.patch.object(plain_products, most, -1))
        for backend in ("cuda", "triton", "cpu"):
            module = dispatch.load(backend)
            stubs.enter_context(mock.patch.object(module, "why_not", refusing(backend)))
        stubs.callback(dispatch._routes.cache_clear)
        dispatch._routes.cache_clear()
        yield


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


def frozen(case, t):
    """The output of a layer with a core whose first columns of B are frozen."""
    return functional.linear(
        t["x"], t["weight"], t["bias"], t["lora_A"], t["lora_B"], t["core"], frozen_columns=3
    )


@in_emulator
def test_operands_that_begin_elsewhere():
    """Columns of what was made, and activations of the same strides that are not aligned."""
    case = Case(testing.FORMS[2], 33, 72, 136, 8, torch.bfloat16)
    wide = torch.randn(33, 152).to(case.dtype)
    with host_on_triton.on_gpu(90) as cuda:
        address = host_on_triton.address_of(cuda.library.cuLaunchKernelEx)
        several = [
            testing.make(case, sliced=False) | {"x": wide[:, first : first + 136]}
            for first in (0, 8, 1)
        ]
        by_python = [step(case, tensors, cuda, frozen) for tensors in several]
        with host_on_triton.served_by_host(address) as calls:
            for _ in range(3):
                calls.computed.clear()
                for tensors, wanted in zip(several, by_python, strict=True):
                    assert step(case, tensors, cuda, frozen) == wanted
            assert calls.computed == []
    assert by_python[0] != by_python[2]


@in_emulator
def test_rows_of_an_activation():
    """What eager drops goes in blocks of rows, by the kernel."""
    case = Case(testing.FORMS[0], 5000, 72, 136, 8, torch.float32, 0.3)
    tensors = testing.make(case, sliced=False)
    with (
        host_on_triton.on_gpu(90) as cuda,
        chosen({"linear": "triton"}),
        mock.patch.object(masks, "why_not_kernel", return_value=""),
    ):
        by_python = step(case, tensors, cuda)
        address = host_on_triton.address_of(cuda.library.cuLaunchKernelEx)
        with host_on_triton.served_by_host(address) as calls:
            for _ in range(3):
                calls.computed.clear()
                assert step(case, tensors, cuda) == by_python
    assert calls.computed == []
    inside = [word[0] for _, _, words in by_python for word in words if type(word) is tuple]
    assert any(name == "x" and offset for name, offset in inside)


@in_emulator
def test_threads_repeat_the_same_recipes():
    tensors = testing.make(LORA)
    with host_on_triton.on_gpu(90) as cuda:
        nothing = host_on_triton.address_of(cuda.library.cuInit)
        with host_on_triton.served_by_host(nothing) as calls:

            def steps(_):
                for _ in range(20):
                    testing.run(testing.ours, LORA, tensors)

            with ThreadPoolExecutor(4) as threads:
                list(threads.map(steps, range(4)))
            assert calls.calls == [True] * 80
            calls.computed.clear()
            steps(0)
    assert calls.computed == []


@in_emulator
def test_a_recipe_is_asked_for_again():
    tensors, hook = testing.make(LORA), followed_or_changed(None)[1]
    with served() as (cuda, calls):
        wanted = step(LORA, tensors, cuda)
        with hook:
            for _ in range(3):
                step(LORA, tensors, cuda)
        assert not any(noted for _, noted in calls.computed)
        assert step(LORA, tensors, cuda) == wanted
        calls.computed.clear()
        assert step(LORA, tensors, cuda) == wanted
        assert calls.computed == []


@in_emulator
def test_without_a_function_of_the_driver_calls_stay_in_python():
    def missing():
        raise Failure("CUDA's driver has no cuLaunchKernelEx")

    tensors = testing.make(LORA)
    with served() as (cuda, calls), mock.patch.object(cuda_driver, "launch_address", missing):
        wanted = step(LORA, tensors, cuda)
        assert step(LORA, tensors, cuda) == wanted
    assert calls.calls == [True] * 2
    assert not any(noted for _, noted in calls.computed)


class _Allocated(ctypes.Structure):
    """What glibc's mallinfo2 gives: of interest are mapped, and used of the main arena."""

    _fields_ = [(f"field{i}", ctypes.c_size_t) for i in range(10)]


@pytest.mark.skipif(
    "asan" in os.environ.get("LD_PRELOAD", ""), reason="the sanitizer's malloc counts elsewhere"
)
@in_emulator
def test_memory_is_free_after_its_last_use():
    """Blocks of rows that eager drops, together twice as large as y, are there one by one."""
    allocated = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if allocated is None:
        pytest.skip("this C library does not tell what is allocated")
    allocated.restype = _Allocated
    case = Case(testing.FORMS[0], 20000, 72, 136, 8, torch.float32, 0.3)
    tensors, seen = testing.make(case, sliced=False), []

    def bytes_now():
        found = allocated()
        return found.field4 + found.field7

    @ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 4)
    def launched(*_):
        seen.append(bytes_now())
        return 0

    with (
        host_on_triton.on_gpu(90),
        chosen({"linear": "triton"}),
        mock.patch.object(masks, "why_not_kernel", return_value=""),
        host_on_triton.served_by_host(host_on_triton.address_of(launched)) as calls,
        torch.no_grad(),
    ):
        for _ in range(3):
            calls.computed.clear()
            seen.clear()
            before = bytes_now()
            testing.ours(case, tensors)
    assert calls.computed == []
    assert calls.calls == [True] * 3
    block = 4 * row_blocks.CPU_ELEMENTS
    # One of six, and h.
    assert block < max(seen) - before < 2 * block


@in_emulator
def test_what_python_has_to_see_is_computed_there():
    from lorafast.engine.kernels.project import project_kernel

    tensors, primitives = testing.make(LORA), 5
    with served() as (cuda, calls):
        for _ in range(2):
            wanted = step(LORA, tensors, cuda)
        contexts = followed_or_changed(project_kernel)
        route = gemm_routing.Route("base first")
        for context in (*contexts[:-1], gemm_routing.forcing(route)):
            calls.computed.clear()
            with context, contextlib.suppress(ValueError):
                step(LORA, tensors, cuda)
                assert len(calls.computed) == primitives, context
        calls.computed.clear()
        with contexts[-1]:
            assert step(LORA, tensors, cuda) == wanted
        assert calls.computed == [("project", False)]
        calls.computed.clear()
        assert step(LORA, tensors, cuda) == wanted
        assert calls.computed == []


@in_emulator
def test_a_refused_launch_is_made_in_python():
    tensors = testing.make(LORA)
    with served() as (cuda, calls):
        for _ in range(2):
            wanted = step(LORA, tensors, cuda)
        calls.computed.clear()
        cuda.refuse(1)
        assert step(LORA, tensors, cuda) == wanted
        assert calls.computed == [("project", False)]


@in_emulator
def test_what_has_no_recipe_stays_in_python():
    tensors = testing.make(Case(testing.FORMS[0], 64, 64, 64, 8, torch.bfloat16), sliced=False)
    with served() as (_, calls):
        for _ in range(6):
            calls.computed.clear()
            testing.run(testing.ours, LORA, tensors | {"x": tensors["weight"], "dy": tensors["dy"]})
        # x and the weight share their memory, and are told apart: they are two tensors.
        assert calls.computed == []
        for _ in range(6):
            calls.computed.clear()
            x = tensors["weight"]
            functional.linear(x, x, None, tensors["lora_A"], tensors["lora_B"])
        assert calls.computed == [("linear", False)]


def test_what_is_made_in_python_is_told(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(devices, "of", lambda device: devices.Arch("nvidia", "sm_90"))
    monkeypatch.setattr(extension, "why_unused", lambda: "")
    monkeypatch.setattr(host, "_unserved", "")
    monkeypatch.setattr(triton_internals, "enabled", True)
    assert host.why_python({"triton", "eager"}, gpu) == ""
    monkeypatch.setattr(triton_internals, "enabled", False)
    why = "launches of this version of Triton are not repeated"
    assert host.why_python({"triton", "eager"}, gpu) == why
    assert host.why_python({"cuda"}, gpu) == ""
    monkeypatch.setattr(devices, "of", lambda device: devices.Arch("amd", "gfx942"))
    why = "launches of Triton's kernels are repeated on NVIDIA's GPUs alone"
    assert host.why_python({"triton"}, gpu) == why
    monkeypatch.setattr(extension, "why_unused", lambda: "it is not asked for")
    assert host.why_python({"cuda"}, gpu) == "it is not asked for"
    assert host.why_python({"eager"}, gpu) == ""
    monkeypatch.setattr(host, "why_python", lambda backends, device: "of a reason")
    (row,) = lorafast.explain(lorafast.Linear(16, 16, adapter=lorafast.DoRA(r=2))).rows
    assert "calls are made in Python: of a reason" in row.notes


@in_emulator
def test_the_log_names_what_stays_in_python():
    x, told = torch.randn(64, 64), []
    factors = torch.randn(4, 64), torch.randn(64, 4)
    with (
        mock.patch.dict(os.environ, {"LORAFAST_LOG": "1"}),
        mock.patch.object(dispatch, "announce", told.append),
        served(),
    ):
        for _ in range(3):
            functional.linear(x, x, None, *factors)
    assert "linear stays in Python: an operand is another one too, or empty" in told
