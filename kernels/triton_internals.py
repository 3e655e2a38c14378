"""Every private symbol of Triton that lorafast's launches use, and when they may be used.

What rests on them saves host time and nothing else. It is on for the versions of Triton in
TESTED_VERSIONS and off for all others, and while something follows or changes launches: then every
launch goes through `kernel[grid](...)`, which does the same.
"""

from __future__ import annotations

import ctypes
import importlib
import re
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import triton
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

# The releases on which the tests have passed with the private symbols in use.
TESTED_VERSIONS = frozenset({(3, 7)})


def is_tested(version: str) -> bool:
    """True if the private symbols may be used on this version of Triton, such as "3.7.1"."""
    release = re.fullmatch(r"(\d+)\.(\d+)\.\d+(\+.*)?", version)
    return release is not None and (int(release[1]), int(release[2])) in TESTED_VERSIONS


def _find(path: str) -> Any:
    """Return the attribute of triton.knobs at the dotted path, or None if this Triton lacks it."""
    found: Any = knobs
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


_runtime, _compilation = _find("runtime"), _find("compilation")
_enter_hooks = _find("runtime.launch_enter_hook")
_exit_hooks = _find("runtime.launch_exit_hook")

try:
    _cuda: Any = importlib.import_module("triton.backends.nvidia.driver")
except ImportError:
    _cuda = None

# True if compiled kernels may be launched without Triton's binder. A test sets it to False to
# pretend another Triton.
enabled = (
    is_tested(triton.__version__)
    and _runtime is not None
    and _compilation is not None
    and isinstance(getattr(_enter_hooks, "calls", None), list)
    and isinstance(getattr(_exit_hooks, "calls", None), list)
    # That of the environment. One that is set later is looked for at every launch.
    and not getattr(_compilation, "instrumentation_mode", "")
)


# Of a tensor map of CUDA.
_MAP_BYTES = 128
# Triton's types of the numbers that a launch in C++ passes on.
_NUMBERS = ("i32", "i64", "fp32")
# The type of the devices whose tensors are launched with in C++. A test has others.
LAUNCHED_TENSORS = "cuda"


class Passed(NamedTuple):
    """What CUDA is given of a compiled kernel: its function, its warps, its bytes of shared memory.

    kinds: for each argument of a launch "number", None for one that is no parameter of the
    function, or what Triton's encoder of tensor maps is told about a descriptor.
    """

    function: int
    warps: int
    shared: int
    kinds: list[object]


class Compiled(NamedTuple):
    """A compiled kernel as it is launched. constants: its constexprs, which come last.

    passed: None if a launch gives CUDA more than what Passed holds.
    """

    launch: Callable[..., None]
    function: object
    metadata: object
    constants: tuple[object, ...]
    passed: Passed | None


def binder_needed(kernel: Any) -> bool:
    """True if Triton has to see a launch: for a hook, debugging, instrumentation, an interpreter.

    These can change between two launches, so this is asked at each.
    """
    return (
        not enabled
        or type(kernel) is not JITFunction
        or _runtime.launch_enter_hook is not _enter_hooks
        or _runtime.launch_exit_hook is not _exit_hooks
        or bool(_enter_hooks.calls or _exit_hooks.calls or kernel.pre_run_hooks or _runtime.debug)
        or _runtime.add_stages_inspection_hook is not None
        or bool(vars(_compilation).get("instrumentation_mode"))
    )


def alignment_is_all(kernel: JITFunction) -> bool:
    """True if Triton compiles for the alignment of pointers, and for nothing else of a tensor.

    For AMD's GPUs it also compiles for the size of a tensor's memory.
    """
    return driver.active.get_current_target().backend == "cuda" and not any(
        param.annotation or param.is_const or param.do_not_specialize_on_alignment
        for param in kernel.params
        if not param.is_constexpr
    )


def specialized(kernel: JITFunction) -> list[bool]:
    """Return for every parameter if Triton may compile for its value."""
    return [not param.do_not_specialize for param in kernel.params]


def current_device() -> int:
    """Return the device on which Triton launches."""
    return driver.active.get_current_device()


def compiled_form(
    kernel: JITFunction, form: Any, constants: dict[str, object], count: int
) -> Compiled | None:
    """Return what `kernel[grid](...)` returned as it is launched, None if Triton launches it alone.

    constants: the constexprs by name. count: the number of other arguments.
    """
    names = kernel.arg_names[len(kernel.arg_names) - len(constants) :]
    if form is None or set(names) != set(constants):
        return None
    return Compiled(
        form.run, form.function, form.packed_metadata, tuple(constants[name] for name in names),
        _passed_to_driver(form, count),
    )  # fmt: skip


def _passed_to_driver(form: Any, count: int) -> Passed | None:
    run = form.run
    if _cuda is None or type(run) is not _cuda.CudaLauncher:
        return None
    if type(driver.active.utils) is not _cuda.CudaUtils:
        return None
    special = (
        run.launch_cooperative_grid, run.launch_pdl, run.global_scratch_size,
        run.profile_scratch_size, run.num_ctas != 1,
    )  # fmt: skip
    if any(special) or len(form.packed_metadata) != 3:
        return None
    warps, _, shared = form.packed_metadata
    types = [*form.src.signature.values()][:count]
    descriptors = [type for type in types if type.startswith("tensordesc")]
    metas = list(getattr(form.metadata, "tensordesc_meta", None) or ())
    if len(metas) != len(descriptors):
        return None
    kinds: list[object] = []
    for type_ in types:
        if type_.startswith("tensordesc"):
            kinds.append(metas.pop(0))
        elif type_ == "constexpr":
            kinds.append(None)
        elif type_.startswith("*") or type_ in _NUMBERS:
            kinds.append("number")
        else:
            return None
    return Passed(form.function, warps, shared, kinds)


def launcher(make: Callable, slow: Callable, descriptor_type: type) -> Any:
    """Return a launcher of csrc/launch, None where CUDA's driver has no function for it.

    make: its type. slow: makes all launches that it does not.
    """
    try:
        function = ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx
    except (OSError, AttributeError):
        return None
    address = ctypes.cast(function, ctypes.c_void_p).value
    return make(
        slow, _tensor_map, watched(), "pre_run_hooks", driver, descriptor_type, address,
        LAUNCHED_TENSORS,
    )  # fmt: skip


def watched() -> list[tuple[object, str, object]]:
    """What binder_needed looks at, its kernel apart: objects, attributes and what they have to be.

    None: anything false.
    """
    return [
        (sys.modules[__name__], "enabled", True),
        (_runtime, "launch_enter_hook", _enter_hooks),
        (_runtime, "launch_exit_hook", _exit_hooks),
        (_enter_hooks, "calls", None),
        (_exit_hooks, "calls", None),
        (_runtime, "debug", None),
        (_runtime, "add_stages_inspection_hook", None),
        (_compilation, "instrumentation_mode", None),
    ]


def watched_driver() -> tuple[object, str, object]:
    """What has to be as it is for a compiled kernel to be launched again: Triton's driver."""
    return driver, "_active", driver.active


def _tensor_map(descriptor: Any, meta: dict) -> object:
    """Return Triton's object for a tensor map, whose last 128 bytes are CUDA's."""
    return _cuda.make_tensordesc_arg(descriptor, meta)[0]


def tensor_map_bytes(descriptor: Any, meta: object) -> bytes:
    """Return the tensor map that a launch gives CUDA for a descriptor. meta: its kind in Passed."""
    made = _tensor_map(descriptor, cast(dict, meta))
    return ctypes.string_at(id(made) + type(made).__basicsize__ - _MAP_BYTES, _MAP_BYTES)


def launch(compiled: Compiled, grid: tuple[int, ...], device: int, args: tuple) -> None:
    """Launch a compiled kernel on the current stream, with no hooks."""
    x, y, z = (*grid, 1, 1)[:3]
    stream = driver.active.get_current_stream(device)
    compiled.launch(
        x, y, z, stream, compiled.function, compiled.metadata, None, None, None,
        *args, *compiled.constants,
    )  # fmt: skip
