"""Launches in C++ give CUDA, byte for byte, what Triton's own launcher gives it."""

import contextlib
import os
import warnings
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from emulator import fake_cuda
from emulator.process import in_emulator
from helpers.cpp_compiler import needs_compiler
from helpers.emulated_device import nvidia
from helpers.launch_arguments import (
    SIZES,
    TILES,
    any_route,
    cached_descriptor,
    descriptors,
    followed_or_changed,
    vectors,
)
from helpers.random_layers import Draw, call, run
from triton.tools.tensor_descriptor import TensorDescriptor

from lorafast.engine.kernels import configs, gemm_routing, launch, triton_internals
from lorafast.runtime import extension, fallback, torch_internals

pytestmark = needs_compiler


class Both:
    """What takes the place of launch.run: every launch is made by Triton, and then in C++.

    counted: the launches; by_python: those that C++ left to Python.
    """

    def __init__(self, cuda: fake_cuda.Cuda):
        module = extension.launcher()
        if isinstance(module, str):
            pytest.skip(module)
        self.cuda, self.counted, self.by_python = cuda, 0, 0
        self.launcher = triton_internals.launcher(module.Launcher, self._slow, TensorDescriptor)
        self.patches = contextlib.ExitStack()
        self.patches.enter_context(
            mock.patch.object(launch, "_launcher", return_value=self.launcher)
        )
        self.patches.enter_context(mock.patch.object(launch, "_arguments", {}))

    def _slow(self, *args, **flags) -> None:
        self.by_python += 1
        launch._run(*args, **flags)

    def __call__(self, kernel, grid, tile, *args, **flags) -> None:
        """Launch a kernel both ways, and compare what CUDA was given."""
        self.counted += 1
        self.cuda.noted()
        launch._through_triton(kernel, grid, tile, args, flags)
        wanted = self.cuda.noted()
        self.launcher(kernel, grid, tile, *args, **flags)
        assert self.cuda.noted() == wanted, (kernel, grid, tile, args, flags)


@contextlib.contextmanager
def both_ways(capability):
    """Return a context in which launch.run is a Both, which it yields."""
    with contextlib.ExitStack() as stubs:
        stubs.enter_context(mock.patch.dict(os.environ, {"LORAFAST_BACKEND": "triton"}))
        stubs.enter_context(mock.patch.object(launch, "descriptor", cached_descriptor))
        stubs.enter_context(mock.patch.object(triton_internals, "LAUNCHED_TENSORS", "cpu"))
        stubs.enter_context(nvidia(capability))
        both = Both(stubs.enter_context(fake_cuda.launching(capability)))
        stubs.enter_context(both.patches)
        stubs.enter_context(mock.patch.object(launch, "run", both))
        yield both


@pytest.mark.parametrize(
    ("first", "count"), [(0, 20), pytest.param(1000, 1000, marks=pytest.mark.slow)]
)
@in_emulator
def test_layers_launch_the_same(first, count):
    with both_ways(90) as both:
        for case in range(first, first + count):
            one = call(case)
            # The second call finds kept kernels.
            for _ in range(2):
                pick = any_route(Draw(case))
                with mock.patch.object(gemm_routing, "pick", pick), torch.no_grad():
                    run(one)
    assert both.by_python < 0.55 * both.counted


@in_emulator
def test_kept_kernels_fit_their_arguments():
    from emulator.kernels import tma_product_kernel

    from lorafast.engine.kernels.drop import drop_kernel

    floats = vectors(torch.bfloat16, torch.float16, torch.float32)
    arguments = [floats, vectors(torch.int64), floats, *[SIZES] * 8, [1.0, 2.0, -0.5]]
    maps = [*[[*descriptors(), None]] * 3, *[SIZES] * 3]
    for kernel, options, flag in (
        (drop_kernel, arguments, "ACCUMULATES"),
        (tma_product_kernel, maps, "BY_ROW"),
    ):
        draw = Draw(0)
        with both_ways(90) as both:
            for _ in range(600):
                args, tile = [some[0] for some in options], TILES[0]
                flags, grid = {flag: draw.random() < 0.5}, (1 + draw.randrange(3), 2)
                for _ in range(draw.randrange(3)):
                    place = draw.randrange(len(args) + 1)
                    if place < len(args):
                        args[place] = draw.choice(options[place])
                    else:
                        tile = draw.choice(TILES)
                launch.run(kernel, grid, tile, *args, **flags)
        assert both.counted == 600
        assert both.by_python < 400


@in_emulator
def test_what_is_followed_or_refused_is_tritons():
    from lorafast.engine.kernels.drop import drop_kernel

    x, seed = torch.empty(32, 32), torch.zeros(1, dtype=torch.int64)
    args = (drop_kernel, (1, 1), configs.DROP, x, seed, x, 0, 32, 32, 32, 1, 32, 4, 5, 1.0)
    unusual = followed_or_changed(drop_kernel)
    with both_ways(90) as both:
        for _ in range(3):
            both.launcher(*args, ACCUMULATES=False)
        assert both.by_python == 1
        for context in unusual:
            with context, contextlib.suppress(ValueError):
                both.launcher(*args, ACCUMULATES=False)
        assert both.by_python == 1 + len(unusual)
        both.cuda.noted()
        both.cuda.refuse(1)
        both.launcher(*args, ACCUMULATES=False)
        assert both.by_python == 2 + len(unusual)
        once = both.cuda.noted()
        both.launcher(*args, ACCUMULATES=False)
        assert both.cuda.noted() == once
        both.launcher(drop_kernel, (0, 1), *args[2:], ACCUMULATES=False)
        assert both.cuda.noted() == b""
        assert both.by_python == 2 + len(unusual)
        both.cuda.refuse(2)
        with pytest.raises(RuntimeError, match="refused"):
            both.launcher(*args, ACCUMULATES=False)


@in_emulator
def test_another_driver_has_kernels_of_its_own():
    from lorafast.engine.kernels.scale_cast import scale_cast

    F = torch.randn(32, 32)
    with both_ways(90) as both, fake_cuda.launching(80):
        for count in (1, 1):
            scale_cast(F, torch.bfloat16)
            assert both.by_python == count


@in_emulator
def test_forms_that_need_more_than_a_launch_are_tritons():
    from triton.backends.nvidia import driver as nvidia_driver

    from lorafast.engine.kernels.drop import drop_kernel

    signature = {"x": "*fp32", "n": "i32", "s": "fp32", "none": "constexpr"}

    def passed(kinds=(), packed=(4, 1, 1024), **changes):
        form = fake_cuda.NotCompiled(
            drop_kernel, signature | dict(kinds), {}, SimpleNamespace(num_warps=4, num_stages=1),
            both.cuda,
        )  # fmt: skip
        form.packed_metadata = packed
        for name, value in changes.items():
            setattr(form if name == "run" else form.run, name, value)
        return triton_internals._passed_to_driver(form, 4)

    with both_ways(90) as both:
        found = passed()
        assert found[1:] == (4, 1024, ["number", "number", "number", None])
        # Another vendor's launcher.
        assert passed(run=mock.Mock()) is None
        for name in ("launch_cooperative_grid", "launch_pdl", "global_scratch_size",
                     "profile_scratch_size"):  # fmt: skip
            assert passed(**{name: 1}) is None, name
        assert passed(num_ctas=2) is None
        # Metadata and types that this file does not know.
        assert passed(packed=(4, 1, 1024, 0)) is None
        assert passed({"n": "u8"}) is None
        assert passed({"s": "fp64"}) is None
        with mock.patch.object(nvidia_driver, "CudaUtils", mock.Mock):
            assert passed() is None
        with mock.patch.object(triton_internals, "_cuda", None):
            assert passed() is None


@pytest.mark.parametrize("why", ["asked", "torch", "unbuilt", "platform"])
def test_launches_are_made_by_python_where_there_is_no_module(why, monkeypatch):
    monkeypatch.setattr(fallback, "_to_issue", [True])
    built = mock.Mock(side_effect=["no such platform"])
    if why == "asked":
        monkeypatch.setenv("LORAFAST_HOST", "0")
    elif why == "torch":
        monkeypatch.setattr(torch_internals, "enabled", False)
    elif why == "unbuilt":
        built.side_effect = [fallback.Remediable("no compiler")]
    monkeypatch.setattr(extension, "_of_torch", built)
    with warnings.catch_warnings(record=True) as issued:
        warnings.simplefilter("always")
        assert launch._launcher.__wrapped__() is None
    assert built.called == (why in ("unbuilt", "platform"))
    assert [str(one.message) for one in issued] == (
        ["lorafast launches its kernels the slower way, by Python: no compiler"]
        if why == "unbuilt"
        else []
    )


def test_nothing_is_launched_in_cpp_without_a_driver_of_cuda(monkeypatch):
    make = mock.Mock()
    monkeypatch.setattr("ctypes.CDLL", mock.Mock(side_effect=OSError))
    assert triton_internals.launcher(make, print, TensorDescriptor) is None
    monkeypatch.setattr("ctypes.CDLL", mock.Mock(return_value=object()))
    assert triton_internals.launcher(make, print, TensorDescriptor) is None
    assert not make.called
