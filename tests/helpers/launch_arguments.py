"""Arguments of launches that differ in what Triton compiles for, and what makes one unusual."""

from unittest import mock

import torch

from lorafast.engine.kernels import configs, gemm_routing, launch, triton_internals

SIZES = [48, 1, 32, 17, 2**31, 2**31 + 1, -16, 2**63]
TILES = [configs.DROP, *(configs.DROP._replace(**{name: 8}) for name in configs.Tile._fields)]


def vectors(*dtypes):
    """Return vectors of some dtypes, aligned and misaligned."""
    wide = [torch.empty(64, dtype=dtype) for dtype in dtypes]
    return [vector[first:] for vector in wide for first in (0, 1, 8)]


def cached_descriptor(t, block):
    """Return a descriptor as a GPU's tensors have them, cached by address."""
    return launch._cached_descriptor(t.data_ptr(), t.dtype, tuple(t.shape), t.stride(0), block)


def descriptors():
    """Return descriptors of two blocks and two dtypes."""
    return [
        cached_descriptor(torch.empty(64, 64, dtype=dtype), block)
        for block in ((64, 32), (32, 64))
        for dtype in (torch.bfloat16, torch.float16)
    ]


def any_route(draw):
    """Return a function that picks a route for a query, mostly one by TMA or with a split sum."""

    def pick(query):
        routes = gemm_routing.candidates(query)
        some = [route for route in routes if route.form == "tma" or route.splits > 1]
        return draw.choice(some if some and draw.random() < 0.7 else routes)

    return pick


def followed_or_changed(kernel):
    """Return contexts in each of which Triton itself must launch the kernel."""
    from triton import knobs

    runtime, hook = knobs.runtime, mock.Mock()
    return [
        mock.patch.object(triton_internals, "enabled", False),
        mock.patch.object(runtime.launch_enter_hook, "calls", [hook]),
        mock.patch.object(runtime.launch_exit_hook, "calls", [hook]),
        mock.patch.object(runtime, "launch_enter_hook", None),
        mock.patch.object(runtime, "launch_exit_hook", None),
        mock.patch.object(runtime, "debug", True),
        mock.patch.object(runtime, "add_stages_inspection_hook", return_value=("k", "h")),
        mock.patch.dict(vars(knobs.compilation), {"instrumentation_mode": "fpsan"}),
        mock.patch.object(kernel, "pre_run_hooks", [hook]),
    ]
