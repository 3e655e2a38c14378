"""Recipes of the host path: when one is made, what it serves, and what stays in Python."""

import contextlib
import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch
from emulator.process import in_emulator
from helpers import host_on_triton
from helpers.cpp_compiler import needs_compiler
from helpers.launch_arguments import followed_or_changed
from helpers.triton_launches import chosen, served, step

import lorafast
from lorafast import functional, testing
from lorafast.engine import dispatch, host, masks, row_blocks
from lorafast.engine.kernels import gemm_routing, triton_internals
from lorafast.runtime import cuda_driver, devices, extension
from lorafast.runtime.toolchain import Failure
from lorafast.testing import Case

pytestmark = [
    needs_compiler,
    pytest.mark.skipif(not triton_internals.enabled, reason="this Triton is not followed"),
]
LORA = Case(testing.FORMS[0], 33, 72, 136, 8, torch.bfloat16, 0.3)


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
