"""Random calls of layers down to the launch of every kernel, with a driver that runs nothing.

Binding, specialization and descriptors are Triton's own. On CPU tensors nothing else reaches them:
the interpreter has a path of its own.
"""

import contextlib
import os
from collections import Counter
from unittest import mock

import pytest
import torch
from emulator import binder
from emulator.memory import Fault
from emulator.process import in_emulator
from helpers.emulated_device import nvidia
from helpers.random_layers import Draw, call, run

from lorafast.engine.kernels import gemm_routing, launch

# What every range of calls launches.
KERNELS = {
    "gemm_finish_kernel", "gemm_kernel", "grad_output_finish_kernel", "grad_output_kernel",
    "grad_project_kernel", "low_rank_add_kernel", "project_finish_kernel", "project_kernel",
    "row_norm_kernel", "scale_cast_kernel",
}  # fmt: skip


def cached_descriptor(t, block):
    """Return a descriptor as a GPU's tensors have them, cached by address."""
    return launch._cached_descriptor(t.data_ptr(), t.dtype, tuple(t.shape), t.stride(0), block)


def launched(cases, capability):
    """Return the launches of random calls by kernel, and the descriptors among their arguments."""
    with contextlib.ExitStack() as stubs:
        stubs.enter_context(mock.patch.dict(os.environ, {"LORAFAST_BACKEND": "triton"}))
        stubs.enter_context(mock.patch.object(launch, "descriptor", cached_descriptor))
        stubs.enter_context(nvidia(capability))
        launches = stubs.enter_context(binder.binding(capability))
        for case in cases:
            one, draw = call(case), Draw(case)

            def any_route(query, draw=draw):
                routes = gemm_routing.candidates(query)
                some = [route for route in routes if route.form == "tma" or route.splits > 1]
                return draw.choice(some if some and draw.random() < 0.7 else routes)

            with mock.patch.object(gemm_routing, "pick", any_route), torch.no_grad():
                try:
                    run(one)
                except Exception as error:
                    raise AssertionError(f"{error}: {one.told}") from error
    return Counter(launch.kernel for launch in launches), sum(one.descriptors for one in launches)


@pytest.mark.parametrize(
    ("first", "count"),
    [
        (0, 300),
        *(pytest.param(1000 * i, 1000, marks=pytest.mark.slow) for i in range(1, 5)),
    ],
)
@in_emulator
def test_calls_launch_what_the_kernels_are_compiled_for(first, count):
    counted, descriptors = launched(range(first, first + count), 90)
    assert set(counted) >= {*KERNELS, "gemm_tma_kernel"}, counted
    assert descriptors > count


@pytest.mark.parametrize(
    ("first", "count"), [(5000, 100), pytest.param(6000, 1000, marks=pytest.mark.slow)]
)
@in_emulator
def test_an_architecture_without_tma_gets_no_descriptor(first, count):
    counted, descriptors = launched(range(first, first + count), 80)
    assert set(counted) >= KERNELS, counted
    assert descriptors == 0


@in_emulator
def test_a_kept_kernel_that_does_not_fit_is_seen():
    from emulator.kernels import add_kernel

    x, out = torch.empty(1040), torch.empty(1024)
    with binder.binding(90) as launches:
        kept = add_kernel[(1,)](x, x, out, 1024, 1024)
        kept[(1, 1, 1)](x, x, out, 1024, 1024)
        assert [launch.kernel for launch in launches] == ["add_kernel"] * 2
        for arguments, reason in (
            ((x[1:], x, out, 1024, 1024), "argument 0 is 0x.*, no multiple of 16"),
            ((x, x.half(), out, 1024, 1024), r"argument 1 is of torch.float16, and was \*fp32"),
            ((x, x, out, 1023, 1024), "argument 3 is 0x3ff, no multiple of 16"),
            ((x, x, out, 1024, 512), "argument 4 is 512, and was the constant 1024"),
        ):
            with pytest.raises(Fault, match=reason):
                kept[(1, 1, 1)](*arguments)
        with pytest.raises(Fault, match=r"grid \(1, 65536, 1\)"):
            kept[(1, 65536, 1)](x, x, out, 1024, 1024)
