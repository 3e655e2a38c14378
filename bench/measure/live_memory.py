"""The bytes of meta tensors that are alive at once: exact, without a value in memory."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator

import torch

from lorafast.engine import ops
from lorafast.runtime.torch_internals import DispatchMode, below_autograd, storage_key

_aten = torch.ops.aten
# What bool(tensor) calls.
_TO_NUMBER = _aten._local_scalar_dense.default
_NONZERO = _aten.nonzero.default
# Autograd adds to zeros that it has just made, in place unless a mode is active: then in a copy.
_ZEROS = (_aten.zeros.default, _aten.new_zeros.default, _aten.zeros_like.default)
_IN_PLACE = {
    _aten.scatter_add.default: _aten.scatter_add_.default,
    _aten.index_put.default: _aten.index_put_.default,
    _aten._unsafe_index_put.default: _aten.index_put_.default,
}


class LiveMemory(DispatchMode):
    """Counts the storages that operations on meta tensors make while it is active.

    A storage counts from the operation that returns it until torch frees it, once however many
    tensors share it. lorafast's own ops run as they are written, so that what they allocate inside
    counts too; of torch's operations, what they return. A condition on a meta tensor is true, and
    nothing in one is 0: models ask whether a text has no padding, and which texts have a label.

    on_gpu: False counts what torch allocates on a CPU alone: operands of several dtypes are first
        converted to one.

    Attributes:
        now: bytes alive.
        peak: the most that was alive at once since reset_peak().
    """

    def __init__(self, on_gpu: bool = True) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._on_gpu = on_gpu
        self._storages: dict[int, weakref.ref] = {}
        self._ignored: dict[int, weakref.ref] = {}
        # The storage of zeros that the last operation made.
        self._zeros: int | None = None

    def ignore(self, tensors: Iterable[torch.Tensor]) -> None:
        """Leave the storages of these tensors out, for example weights and inputs."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._ignored[id(storage)] = weakref.ref(storage, _forget(self._ignored, id(storage)))

    def reset_peak(self) -> None:
        """Begin a new peak at what is alive."""
        self.peak = self.now

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.namespace == "lorafast":
            kernel = ops.KERNELS[function._schema.name.partition("::")[2]]
            on_gpu, self._on_gpu = self._on_gpu, True  # the C++ kernels convert in registers
            try:
                with self, below_autograd():
                    return kernel(*args, **kwargs)
            finally:
                self._on_gpu = on_gpu
        result = self._run(function, args, kwargs)
        converted = 0 if self._on_gpu else _converted(function, args, result)
        for tensor in tensors_in(result):
            if tensor.is_meta:
                self._count(tensor)
        self.peak = max(self.peak, self.now + converted)
        self._zeros = id(result.untyped_storage()) if function in _ZEROS else None
        return result

    def _run(self, function, args, kwargs):
        """Return the result of an operation on meta tensors."""
        first = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if first is None or not first.is_meta:
            return function(*args, **kwargs)
        if function is _TO_NUMBER and first.dtype is torch.bool:
            return True
        if function is _NONZERO:
            return first.new_empty((first.numel(), first.dim()), dtype=torch.int64)
        if function in _IN_PLACE and id(first.untyped_storage()) == self._zeros:
            return _IN_PLACE[function](*args, **kwargs)
        return function(*args, **kwargs)

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._storages or key in self._ignored:
            return
        size = storage.nbytes()

        def freed(_: weakref.ref) -> None:
            if self._storages.pop(key, None) is not None:
                self.now -= size

        self._storages[key] = weakref.ref(storage, freed)
        self.now += size


def _forget(kept: dict[int, weakref.ref], key: int) -> Callable[[weakref.ref], None]:
    return lambda _: kept.pop(key, None) and None


def _converted(function, args: tuple, result: object) -> int:
    """Return the bytes of an elementwise operation's operands after their conversion to one dtype.

    Counted are operands that are no such dtype yet, and a result that is not.
    """
    if torch.Tag.pointwise not in function.tags or function._schema.name == "aten::copy_":
        return 0
    operands = [one for one in args if isinstance(one, torch.Tensor) and one.is_meta]
    dtypes = {one.dtype for one in operands if one.dim()}
    if len(dtypes) < 2 or not all(dtype.is_floating_point for dtype in dtypes):
        return 0
    wide = functools.reduce(torch.promote_types, dtypes)
    found = [one for one in (*operands, *tensors_in(result)) if one.dtype != wide]
    return sum(one.numel() * wide.itemsize for one in found)


def tensors_in(value: object) -> Iterator[torch.Tensor]:
    """Yield the tensors in the result of an operation, or in nested lists and dicts."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from tensors_in(one)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Return the bytes of the tensors' storages, each once."""
    return sum({storage_key(t): t.untyped_storage().nbytes() for t in tensors}.values())
