"""Random calls of layers down to the launch of every kernel, with a driver that runs nothing.

Binding, specialization and descriptors are Triton's own. On CPU tensors nothing else reaches them:
the interpreter has a path of its own.
"""

import contextlib
import os
import random
from collections import Counter
from unittest import mock

import pytest
import torch
from emulator import binder
from emulator.memory import Fault
from emulator.process import in_emulator
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

from lorafast import testing
from lorafast.engine.kernels import gemm_routing, launch, triton_internals

# What every range of calls launches.
KERNELS = {
    "gemm_finish_kernel", "gemm_kernel", "grad_output_finish_kernel", "grad_output_kernel",
    "grad_project_kernel", "low_rank_add_kernel", "project_finish_kernel", "project_kernel",
    "row_norm_kernel", "scale_cast_kernel",
}  # fmt: skip

# And what calls of layers of experts launch.
GROUPED_KERNELS = {
    "add_blocks_kernel", "grouped_drop_kernel", "grouped_gain_kernel",
    "grouped_grad_output_finish_kernel", "grouped_grad_output_kernel",
    "grouped_grad_project_kernel", "grouped_low_rank_add_kernel", "grouped_project_kernel",
}  # fmt: skip


def launched(cases, capability):
    """Return the launches of random calls by kernel, and the descriptors among their arguments."""
    with contextlib.ExitStack() as stubs:
        stubs.enter_context(mock.patch.dict(os.environ, {"LORAFAST_BACKEND": "triton"}))
        stubs.enter_context(mock.patch.object(launch, "descriptor", cached_descriptor))
        stubs.enter_context(nvidia(capability))
        launches = stubs.enter_context(binder.binding(capability))
        for case in cases:
            one, pick = call(case), any_route(Draw(case))
            with mock.patch.object(gemm_routing, "pick", pick), torch.no_grad():
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


@pytest.mark.parametrize(
    ("first", "count"), [(0, 30), pytest.param(1000, 400, marks=pytest.mark.slow)]
)
@in_emulator
def test_layers_of_experts_launch_what_the_kernels_are_compiled_for(first, count):
    launched, forms = Counter(), [form for form in testing.FORMS if form.axis == "out"]
    for number in range(first, first + count):
        draw = random.Random(number)
        counts = [draw.choice((0, 1, 5, 70, 300)) for _ in range(draw.choice((1, 2, 40)))]
        N, K, R = (draw.choice((8, 17, 40, 64, 130)) for _ in range(3))
        own = draw.choice(forms), 0, N, K, R, draw.choice((torch.bfloat16, torch.float32))
        one = testing.Case(*own, draw.choice((0.0, 0.3)), draw.random() < 0.5)
        case = testing.ExpertsCase(
            one if one.works else testing.Case(*own), tuple(counts), draw.choice(("", "A", "B"))
        )
        t = testing.make_experts(case, number, sliced=draw.random() < 0.5)
        with (
            mock.patch.dict(os.environ, {"LORAFAST_BACKEND": "triton"}),
            nvidia(90),
            binder.binding(90) as launches,
        ):
            testing.run(testing.ours_experts, case, t)
        launched.update(one.kernel for one in launches)
    assert set(launched) >= GROUPED_KERNELS, launched


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


@contextlib.contextmanager
def bindings():
    """Yield a list that gets the name of every kernel that Triton's binder launches."""
    from triton.runtime.jit import JITFunction

    bound, run = [], JITFunction.run

    def noted(self, *args, **options):
        bound.append(self.fn.__name__)
        return run(self, *args, **options)

    with mock.patch.object(JITFunction, "run", noted):
        yield bound


def launch_varied(kernel, draw, arguments, tiles, flags, capability=90):
    """Launch a kernel with arguments of which one or two at a time are not the first of theirs.

    arguments: for each a list to draw from; flags likewise, by name. Returns the number of
    launches, and how many of them the binder made.
    """
    with binder.binding(capability) as launches, bindings() as bound:
        for _ in range(600):
            args, tile = [options[0] for options in arguments], tiles[0]
            named = {name: options[0] for name, options in flags.items()}
            for _ in range(draw.randrange(3)):
                place = draw.randrange(len(args) + 2)
                if place < len(args):
                    args[place] = draw.choice(arguments[place])
                elif place == len(args) or not flags:
                    tile = draw.choice(tiles)
                else:
                    name = draw.choice(list(flags))
                    named[name] = draw.choice(flags[name])
            launch.run(kernel, (1,), tile, *args, **named)
            assert launches[-1][3:] == (tile.warps, tile.stages)
    return len(launches), len(bound)


@in_emulator
def test_every_kept_kernel_fits_its_arguments():
    from lorafast.engine.kernels.drop import drop_kernel

    floats = vectors(torch.bfloat16, torch.float16, torch.float32)
    arguments = [floats, vectors(torch.int64), floats, *[SIZES] * 8, [1.0, 2.0, True]]
    launches, bound = launch_varied(
        drop_kernel, Draw(0), arguments, TILES, {"ACCUMULATES": [False, True]}
    )
    assert launches == 600
    assert bound < 300


@in_emulator
def test_every_kept_kernel_fits_its_descriptors():
    from emulator.kernels import tma_product_kernel

    arguments = [*[[*descriptors(), None]] * 3, *[SIZES] * 3]
    launches, bound = launch_varied(
        tma_product_kernel, Draw(0), arguments, TILES, {"BY_ROW": [False, True]}
    )
    assert launches == 600
    assert bound < 300


@in_emulator
def test_the_binder_launches_what_is_followed_or_changed():
    from lorafast.engine.kernels.scale_cast import scale_cast, scale_cast_kernel

    F = torch.randn(32, 32)
    unusual = followed_or_changed(scale_cast_kernel)
    assert triton_internals.enabled
    with binder.binding(90) as launches, bindings() as bound:
        for _ in range(3):
            scale_cast(F, torch.bfloat16)
        assert len(bound) == 1
        for context in unusual:
            with context:
                scale_cast(F, torch.bfloat16)
        scale_cast(F, torch.bfloat16)
    assert len(bound) == 1 + len(unusual)
    assert len(launches) == 4 + len(unusual)


@in_emulator
def test_kept_kernels_are_few():
    with mock.patch.object(launch, "_MOST", 4), binder.binding(90), bindings() as bound:
        from lorafast.engine.kernels.scale_cast import scale_cast

        for columns in (8, 16, 24, 32, 40, 8, 40):
            scale_cast(torch.randn(8, columns), torch.bfloat16)
    assert len(bound) == 6
