"""The host path in C++: one call from a layer's tensors to its output, and its autograd node.

csrc/host executes the formula where the `cpu` or the `cuda` backend serves all primitives of a
call. On an NVIDIA GPU with kernels of ours the `triton` backend, `eager` and `cuda` may share them:
what the first two compute is noted once (recipes) and repeated. Everything else is left to the
Python path, which gives the same bits. This module loads it, and holds what it asks of Python: the
plan of a problem, made once by the rules of engine.dispatch, the kernels, and the slow ways.
"""

from __future__ import annotations

from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch.autograd import forward_ad

from lorafast.engine import (
    cuda_forms,
    cuda_kernels,
    dispatch,
    half_products,
    masks,
    ops,
    recipes,
    weight_buffers,
)
from lorafast.engine.precision import activation_dtype
from lorafast.engine.problem import CallOptions, GradMask, LayerTensors, Problem, tokens
from lorafast.runtime import cuda_driver, devices, env, extension, fallback, onednn
from lorafast.runtime.fallback import Remediable

# Plans, as csrc/host/plans.h numbers them, and the flags of CPU's in cpu_backend.h.
PROVISIONAL, PYTHON, CPU, CUDA, RECIPES, MULTIPROCESSORS = -1, 0, 1, 64, 128, 8
# Set where LORAFAST_BACKEND=triton asks: products then take routes by published figures.
TRITON_FORCED = 1 << recipes.ROUTES + 2 * len(recipes.PRIMITIVES)
ONEDNN_BIAS, Y_ALONG, Y_ACROSS, DX_ALONG, DX_ACROSS, ONE_KERNEL = 2, 4, 8, 16, 32, 256
_PRIMITIVES = ("project", "linear", "grad_output", "grad_input", "grad_project")


def _declined(*_: Any) -> None:
    """No call is served."""


def _first_call(x: Any, *rest: Any) -> torch.Tensor | None:
    """linear, until a call comes that it may serve."""
    global linear, _unserved
    if not isinstance(x, torch.Tensor) or not _may_serve(x):
        return None
    served = _load(x.is_cpu)
    if isinstance(served, str):
        if isinstance(served, Remediable):
            fallback.warn_once(f"lorafast's layers take the slower way through Python: {served}")
        linear, _unserved = _declined, served
        return None
    linear = served
    return linear(x, *rest) if rest else None


# linear(x, weight, bias, lora_A, lora_B, core, magnitude, norm, out_scale, lora_bias, seed,
# scaling, dropout, axis, dropout_on, keep, frozen_columns, computes_norm) -> y, or None where the
# Python path must serve: it checks nothing aloud. computes_norm: a norm that is None is computed,
# detached. A weight_buffers.Loan may follow, from which backward takes the weight that is then not
# saved. linear(x, layer, classes) -> y: the other arguments are read from a lora.Linear of PEFT, as
# integrations.peft_calls.usual_call does, to which what is unusual is left; classes: CLASSES there.
# Not to be called while torch.compile traces.
linear: Any = _first_call
# Why no call is served, once that is known.
_unserved = ""


def is_ready() -> bool:
    """True if the host path has been loaded and serves."""
    return linear is not _first_call and linear is not _declined


def why_python(backends: Collection[str], device: torch.device) -> str:
    """Why calls that these backends serve are made in Python, as far as it is known; "" if not."""
    repeated = "triton" in backends and device.type not in ("cpu", "meta")
    if repeated and devices.of(device).vendor != "nvidia":
        return "launches of Triton's kernels are repeated on NVIDIA's GPUs alone"
    if repeated and not _follows_triton():
        return "launches of this version of Triton are not repeated"
    return (extension.why_unused() or _unserved) if {*backends} - {"eager"} else ""


def serves(problems: dict[str, Problem]) -> bool:
    """True if the host path makes the calls of these problems, by primitive; loads it if need be.

    For calls on a CPU whose tensors are plain ones.
    """
    if linear is _first_call:
        _first_call(torch.empty(0))
    cpu = dispatch.load("cpu")
    return is_ready() and all(dispatch.pick(name, one) is cpu for name, one in problems.items())


def _may_serve(x: torch.Tensor) -> bool:
    """True if the host path is used, and a backend may serve that it executes on x's device."""
    if not (x.is_cpu or x.is_cuda) or extension.why_unused():
        return False
    asked = _asked_backend()
    if x.is_cpu:
        return asked in ("auto", "cpu")
    dtype, cuda = activation_dtype(x), _loaded("cuda")
    if asked == "auto":
        return (cuda and cuda.is_admitted(x.device, dtype)) or _may_repeat(x.device, dtype)
    return asked == "cuda" or (asked == "triton" and _may_repeat(x.device))


def _may_repeat(device: torch.device, dtype: torch.dtype | None = None) -> bool:
    """True if launches of Triton's kernels may be noted and repeated on a device.

    dtype: of an activation that `auto` has to serve there.
    """
    if devices.of(device).vendor != "nvidia" or not _loaded("triton"):
        return False
    from lorafast.engine import kernel_choice

    admitted = dtype is None or not kernel_choice.refusals(("project",), dtype, 1, device)
    return admitted and _follows_triton()


def _follows_triton() -> bool:
    """True if what this version of Triton launches is known."""
    from lorafast.engine.kernels import triton_internals

    return triton_internals.enabled


def _loaded(backend: str) -> Any:
    """The module of a backend, None if there is none."""
    found: Any = dispatch.load(backend)
    return None if isinstance(found, str) else found


def _asked_backend() -> str:
    """The value of LORAFAST_BACKEND. ValueError for an unknown one."""
    return env.parse_backend(env.raw_get(env.BACKEND_KEY))


def _load(on_cpu: bool = True) -> Any:
    """The function of the C++ module, or why there is none. on_cpu: for calls on a CPU."""
    if not on_cpu:
        return _configured(extension.host())
    kernels: Any = dispatch.load("cpu")
    if not isinstance(kernels, str):
        # Compiled side by side, they take as long as the host path alone.
        with ThreadPoolExecutor(1) as thread:
            building = thread.submit(extension.host)
            kernels = kernels.library()
    if not isinstance(kernels, str):
        return _configured(building.result())
    if isinstance(kernels, Remediable) and _asked_backend() == "auto":
        # Calls of few tokens ask no backend, which would warn.
        fallback.warn_of_eager(kernels)
    return str(kernels)


def _configured(module: Any) -> Any:
    """The function of the C++ module, told what it may ask of Python; or why there is none."""
    if isinstance(module, str):
        return module
    module.configure(
        _kernels, _load_form, _plan, _backward, ops.modified_words, half_products.addmm,
        recipes.compute, recipes.tensor_map, weight_buffers.give_back, env.RAW,
        (env.BACKEND_KEY, env.LOG_KEY), vars(forward_ad),
    )  # fmt: skip
    return module.linear


def _kernels() -> Any:
    """The entry points of the `cpu` backend's kernels, a capsule, once it serves a plan."""
    backend: Any = dispatch.load("cpu")
    return backend.library().kernels


def _load_form(
    stem: str, dtype: int, tiles: int, flags: int, tf32: int, device: str
) -> tuple[int, int, int, str]:
    """The addresses of cuLaunchKernelEx and of a form on a device, its threads and parameters."""
    (torch_dtype,) = (one for one, number in cuda_forms.DTYPES.items() if number == dtype)
    form = cuda_forms.Form(stem, torch_dtype, tiles, flags, bool(tf32))
    function = cuda_forms.function(form, torch.device(device))
    letters = cuda_forms.KERNELS[stem].parameters
    return cuda_driver.launch_address(), function, form.threads, letters


def _plan(
    x: torch.Tensor,
    weight: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    core: torch.Tensor | None,
    magnitude: torch.Tensor | None,
    out_scale: torch.Tensor | None,
    scaling: float,
    p: float,
    axis: str,
    dropout_on: str,
    keep: str,
) -> int:
    """What executes the calls of a problem: CPU with flags, CUDA with the multiprocessors, RECIPES
    with these and the routes, PYTHON or PROVISIONAL.
    """
    tensors = LayerTensors(weight, None, A, B, core, magnitude, None, out_scale)
    options = CallOptions(scaling, p, axis, dropout_on, keep)
    asked = dict.fromkeys(_PRIMITIVES, dispatch.routes(x, tensors, options))
    if magnitude is not None:
        asked["row_norm"] = dispatch.norm_routes(tensors, options)
        if options.drops_base:
            asked["drop"] = asked["linear"]
    chosen = {primitive: _name_of(routes[primitive]) for primitive, routes in asked.items()}
    if not all(primitive in routes for primitive, routes in asked.items()):
        return PROVISIONAL
    backends = {*chosen.values()}
    if backends == {"cuda"}:
        return CUDA | cuda_kernels.multiprocessors(x.device) << MULTIPROCESSORS
    if backends == {"cpu"}:
        return _cpu_plan(x, weight)
    return _recipe_plan(x, chosen, p, magnitude is not None)


def _name_of(backend: Any) -> str:
    """The name of a backend's module."""
    return getattr(backend, "__name__", "").rpartition(".")[2]


def _recipe_plan(x: torch.Tensor, chosen: dict[str, str], p: float, has_gain: bool) -> int:
    """The plan of a problem of which no backend of C++ serves all primitives."""
    if not {*chosen.values()} <= {*recipes.BACKENDS} or not x.numel() or not _may_repeat(x.device):
        return PYTHON
    # One backend computes the gain for all: the cuda backend has a kernel of its own.
    gained = {chosen[name] == "cuda" for name in ("project", "linear", "grad_output")}
    if has_gain and len(gained) > 1:
        return PYTHON
    # Two primitives that share a mask as a tensor make it once in Python.
    shares = chosen["grad_input"] == chosen["grad_project"] == "eager"
    if p and shares and not masks.kernel_serves(x.device, x.dtype):
        return PYTHON
    plan = RECIPES | recipes.routes_of(chosen) | (env.is_forced("triton") and TRITON_FORCED)
    if "cuda" in chosen.values():
        plan |= cuda_kernels.multiprocessors(x.device) << MULTIPROCESSORS
    return plan


def _cpu_plan(x: torch.Tensor, weight: torch.Tensor) -> int:
    """The plan of a problem that the `cpu` backend serves."""
    (N, K), M, applies = weight.shape, tokens(x), half_products.applies
    backend: Any = dispatch.load("cpu")
    flags = {
        ONEDNN_BIAS: onednn.has_bias_product(),
        Y_ALONG: applies(x.dtype, M, N, K, True),
        Y_ACROSS: applies(x.dtype, M, N, K, False),
        DX_ALONG: applies(x.dtype, M, K, N, True),
        DX_ACROSS: applies(x.dtype, M, K, N, False),
        ONE_KERNEL: backend.is_one_kernel(M, x.dtype),
    }
    return CPU | sum(flag for flag, is_set in flags.items() if is_set)


def _backward(
    dy: torch.Tensor,
    saved: tuple[torch.Tensor | None, ...],
    options: tuple,
    needs: tuple[bool, ...],
) -> list[torch.Tensor | None]:
    """The gradients by the op, in GradMask's order: where an observer is active or second
    derivatives are asked for.
    """
    made = iter(torch.ops.lorafast.linear_backward(dy, *saved, *options, list(needs)))
    return [next(made) if need else None for need in GradMask(*needs)]
