"""Launches of kernels, and what they need of tensors: device, precision, strides, descriptors."""

from __future__ import annotations

import contextlib
import functools
import operator
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from lorafast.engine import philox
from lorafast.engine.kernels import configs, triton_internals
from lorafast.runtime import devices, extension, fallback
from lorafast.runtime.fallback import Remediable


def arch_of(x: torch.Tensor) -> devices.Arch:
    """Return the architecture of x's device; that of the CPU for Triton's interpreter."""
    return devices.of(x.device)


def precision(x: torch.Tensor) -> str:
    """Return the input precision of tl.dot: "tf32" only if torch's own products use it."""
    # allow_tf32, the older name of this setting, raises once the newer name has been used.
    return (
        "tf32"
        if x.dtype == torch.float32
        and x.is_cuda
        and torch.backends.cuda.matmul.fp32_precision == "tf32"
        else "ieee"
    )


def tf32_if_any(x: torch.Tensor) -> str:
    """Return "tf32" where x's device multiplies in it, else "ieee". Of AMD's GPUs one does."""
    arch = arch_of(x)
    return "ieee" if arch.vendor == "amd" and arch.name != "gfx942" else "tf32"


def seed_of(seed: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """Return the seed; x as a placeholder, which is not read, if there is no dropout."""
    return x if seed is None else seed


@functools.lru_cache(maxsize=4096)
def dropout(K: int, p: float) -> tuple[int, int, float]:
    """Return the number of Philox calls for a row of K elements, the threshold and the scale."""
    return configs.ceil_div(K, philox.GROUP), philox.threshold(p), philox.scale(p)


def dense(t: torch.Tensor, dim: int) -> bool:
    """True if neighbours along dim are adjacent in memory."""
    # The tuple of all strides takes half the time of one of them.
    return t.stride()[dim] == 1 or t.shape[dim] == 1


class Layout(NamedTuple):
    """How a matrix lies in memory. aligned: its first element lies at a multiple of 16 bytes."""

    shape: tuple[int, int]
    stride: tuple[int, int]
    itemsize: int
    aligned: bool

    def dense(self, dim: int) -> bool:
        """True if neighbours along dim are adjacent."""
        return self.stride[dim] == 1 or self.shape[dim] == 1

    @property
    def describable(self) -> bool:
        """True if a TMA descriptor can describe the matrix.

        One dim is dense, the other has a stride of a multiple of 16 bytes, and rows neither overlap
        nor are empty.
        """
        dim = 1 if self.dense(1) else 0
        stride = self.stride[1 - dim]
        return (
            self.dense(dim)
            and min(self.shape) > 0
            and stride >= self.shape[dim]
            and stride * self.itemsize % 16 == 0
            and self.aligned
        )


def layout(t: torch.Tensor) -> tuple[tuple[int, int], tuple[int, int], int, bool]:
    """Return how a matrix lies in memory: the fields of its Layout, which take longer to name."""
    return t.shape, t.stride(), t.itemsize, t.data_ptr() % 16 == 0


def aligned(t: torch.Tensor) -> bool:
    """True if a TMA descriptor can describe the matrix."""
    return Layout(*layout(t)).describable


def _empty(like: torch.Tensor, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return like.new_empty(*shape, dtype=dtype)


# empty(like, dtype, *shape): an uninitialised tensor on another's device. It is csrc/host's as soon
# as that has been loaded for launches, and takes half the time then.
empty: Callable[..., torch.Tensor] = _empty


def descriptor(t: torch.Tensor, block: tuple[int, int]) -> TensorDescriptor:
    """Return a TMA descriptor of t, dense along its rows, for loads and stores of one block.

    On a GPU it is cached by address, shape and block: that of a weight is the same in every call.
    """
    if not t.is_cuda:
        return TensorDescriptor(t, list(t.shape), [t.stride(0), 1], list(block))
    return _cached_descriptor(t.data_ptr(), t.dtype, tuple(t.shape), t.stride(0), block)


class Address:
    """A tensor's stand-in in a cached descriptor; it does not keep the tensor's memory alive."""

    __slots__ = ("dtype", "pointer")

    def __init__(self, pointer: int, dtype: torch.dtype):
        self.pointer, self.dtype = pointer, dtype

    def data_ptr(self) -> int:
        """Return the address of the tensor's first element."""
        return self.pointer


@functools.lru_cache(maxsize=8192)
def _cached_descriptor(
    pointer: int, dtype: torch.dtype, shape: tuple[int, int], stride: int, block: tuple[int, int]
) -> TensorDescriptor:
    # Making a descriptor takes longer than looking it up, and a call needs up to six of them.
    return descriptor_at(pointer, dtype, shape, (stride, 1), block)


def descriptor_at(
    pointer: int,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    block: tuple[int, ...],
) -> TensorDescriptor:
    """Return a TMA descriptor of what lies at an address."""
    return TensorDescriptor(Address(pointer, dtype), list(shape), list(strides), list(block))


def _run(
    kernel: Any, grid: tuple[int, ...], tile: configs.Tile, *args: object, **flags: object
) -> None:
    """Launch a kernel on its tensors' device.

    The first launch of its kind goes through Triton, which compiles. Its compiled kernel is kept,
    and the next ones call it without Triton's binder, which takes longer than all else in a launch.

    args: all arguments but constexprs, in order. flags: the constexprs that are no block sizes;
    those, the warps and the stages are the tile's.
    """
    if triton_internals.binder_needed(kernel):
        with _on_device_of(args):
            _through_triton(kernel, grid, tile, args, flags)
        return
    kinds = kernel.fn, tuple(map(type, args))
    # kernel itself would hash its source.
    arguments = _arguments.get(kinds)
    if arguments is None:
        arguments = _arguments[kinds] = _Arguments(kernel, kinds[1])
    device = triton_internals.current_device()
    if arguments.elsewhere(args, device):
        with _on_device_of(args):
            _run(kernel, grid, tile, *args, **flags)
        return
    key = arguments.key(args, device, tile, flags)
    compiled = arguments.compiled.get(key)
    if compiled is not None:
        triton_internals.launch(compiled, grid, device, args)
    else:
        form = _through_triton(kernel, grid, tile, args, flags)
        constants = flags | _blocks(kernel, tile)
        compiled = triton_internals.compiled_form(kernel, form, constants, len(args))
        if key is None or compiled is None:
            return
        arguments.keep(key, compiled)
    if compiled.passed is not None:
        _keep_in_cpp(compiled.passed, kernel, grid, tile, args, flags)


# All launches of lorafast's kernels are made by this: _run, and where it can serve the launcher of
# csrc/launch, which leaves to _run what it has no kernel for.
run: Callable[..., None] = _run


# Told of a launch when it has been made: the compiled kernel that is kept for such arguments, None
# if there is none, the kernel, the grid and the arguments.
Note = Callable[["triton_internals.Compiled | None", Any, tuple[int, ...], tuple], None]
_noting = threading.Lock()


@contextlib.contextmanager
def noting(note: Note) -> Iterator[None]:
    """Return a context in which the launches of this thread are made by Python, and noted."""
    global run
    own = threading.get_ident()

    def noted(kernel, grid, tile: configs.Tile, *args: object, **flags: object) -> None:
        if threading.get_ident() != own:
            before(kernel, grid, tile, *args, **flags)
            return
        _run(kernel, grid, tile, *args, **flags)
        note(_kept(kernel, tile, args, flags), kernel, grid, args)

    with _noting:
        before, run = run, noted
        try:
            yield
        finally:
            run = before


def _kept(kernel, tile: configs.Tile, args: tuple, flags: dict) -> triton_internals.Compiled | None:
    """Return the compiled kernel that is kept for such arguments on the current device."""
    arguments = _arguments.get((kernel.fn, tuple(map(type, args))))
    if arguments is None or triton_internals.binder_needed(kernel):
        return None
    key = arguments.key(args, triton_internals.current_device(), tile, flags)
    return arguments.compiled.get(key)


def _keep_in_cpp(
    passed: triton_internals.Passed, kernel, grid, tile: configs.Tile, args: tuple, flags: dict
) -> None:
    """Let the next launch for such arguments be made in C++, if that may be."""
    global run, empty
    launcher = _launcher()
    if launcher is None:
        return
    launcher.declare(kernel, bytes(triton_internals.specialized(kernel)))
    if launcher.keep(*passed, kernel, grid, tile, *args, **flags) and run is _run:
        run, empty = launcher, launcher.empty


@functools.cache
def _launcher() -> Any:
    """The launcher of csrc/launch, None where there is none."""
    module = extension.launcher()
    if isinstance(module, str):
        if isinstance(module, Remediable):
            fallback.warn_once(f"lorafast launches its kernels the slower way, by Python: {module}")
        return None
    return triton_internals.launcher(module.Launcher, _run, TensorDescriptor)


def _on_device_of(args: tuple) -> contextlib.AbstractContextManager:
    """Return a context in which the current device, on which Triton launches, is the tensors'."""
    for arg in args:
        if isinstance(arg, torch.Tensor):
            if arg.is_cuda:
                return torch.cuda.device(arg.device)
            if arg.is_xpu:
                return torch.xpu.device(arg.device)
            break
    return contextlib.nullcontext()


def _through_triton(kernel, grid, tile: configs.Tile, args: tuple, flags: dict) -> Any:
    return kernel[grid](
        *args, **flags, **_blocks(kernel, tile), num_warps=tile.warps, num_stages=tile.stages
    )


def _blocks(kernel: Any, tile: configs.Tile) -> dict[str, int]:
    names = [name for name in kernel.arg_names if name.startswith("BLOCK_")]
    return {name: getattr(tile, name) for name in names}


_dtype, _address = operator.attrgetter("dtype"), torch.Tensor.data_ptr
# Other kinds are not kept: what Triton compiles for them is not known here.
_KINDS = (torch.Tensor, torch.nn.Parameter, TensorDescriptor, int, bool, float, type(None))
# The most kernels kept for arguments of the same types. A size of a new value adds one.
_MOST = 1024


class _Arguments:
    """The arguments of a kernel, of given types, and the compiled kernels kept for them.

    A key holds all that Triton compiles for, so kernels of equal keys are the same. Sizes are in it
    as they are, where Triton asks only if they are 1 or multiples of 16: that is found sooner.
    """

    def __init__(self, kernel: Any, types: tuple[type, ...]):
        specialized = triton_internals.specialized(kernel)
        self.compiled: dict[tuple, triton_internals.Compiled] = {}
        self.known = triton_internals.alignment_is_all(kernel) and set(types) <= {*_KINDS}

        def of(*kinds: type, where: tuple[bool, ...] = (True, False)) -> Callable:
            places = zip(types, specialized, strict=False)
            return _getter(
                [i for i, (kind, own) in enumerate(places) if kind in kinds and own in where]
            )

        self.tensors = of(torch.Tensor, torch.nn.Parameter)
        self.first = next(
            (i for i, kind in enumerate(types) if issubclass(kind, torch.Tensor)), None
        )
        self.descriptors = of(TensorDescriptor)
        self.sizes = of(int, where=(True,))
        self.counts = of(int, where=(False,))

    def elsewhere(self, args: tuple, device: int) -> bool:
        """True if the tensors lie on another device than this one, which is the current one."""
        # A tensor of a CPU lies on device -1.
        return self.first is not None and args[self.first].get_device() not in (device, -1)

    def key(self, args: tuple, device: int, tile: configs.Tile, flags: dict) -> tuple | None:
        """Return what the kernel is compiled for, None if a kernel for it is not to be kept."""
        if not self.known:
            return None
        counts, tensors = self.counts(args), self.tensors(args)
        # Triton's type of an integer depends on its value.
        if counts and not -(2**31) <= min(counts) <= max(counts) < 2**31:
            return None
        addresses = tuple(map(_address, tensors))
        misaligned = None
        if functools.reduce(operator.or_, addresses, 0) & 15:
            misaligned = tuple([address & 15 != 0 for address in addresses])
        blocks = [(one.base.dtype, *one.block_shape) for one in self.descriptors(args)]
        return (
            device, tile, self.sizes(args), tuple(map(_dtype, tensors)), misaligned, *blocks,
            *flags.items(),
        )  # fmt: skip

    def keep(self, key: tuple, compiled: triton_internals.Compiled) -> None:
        """Keep a compiled kernel for its key."""
        if len(self.compiled) >= _MOST:
            self.compiled.clear()
        self.compiled[key] = compiled


# By the kernel's function and the types of its arguments.
_arguments: dict[tuple, _Arguments] = {}


def _getter(places: list[int]) -> Callable[[tuple], tuple]:
    """Return a function that takes these places of a tuple, as a tuple."""
    if len(places) > 1:
        return operator.itemgetter(*places)
    return lambda args: tuple([args[i] for i in places])
