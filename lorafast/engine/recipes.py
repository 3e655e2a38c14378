"""Recipes of the primitives, for csrc/host to repeat: what one allocates, computes by torch and
launches for a problem, noted while Python computes it.

All that decides how a primitive is computed are its operands' shapes, strides, dtypes and
alignment, its numbers, and the device. So a call that is noted once serves for all others that
agree in those. What is not known to be so has no recipe, and Python computes it each time.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from lorafast.engine import dispatch
from lorafast.engine.problem import BaseTerm, DownProj, LowRankTerm, UpProj, UpProjGradSpec
from lorafast.runtime import cuda_driver, devices, env, torch_internals
from lorafast.runtime.toolchain import Failure

# The primitives in the order of a plan's routes, and the backends by the numbers they have there.
PRIMITIVES = (
    "project", "linear", "grad_output", "grad_input", "grad_project", "row_norm", "drop",
)  # fmt: skip
BACKENDS = ("eager", "triton", "cuda")
# Where the routes begin in a plan: csrc/host/plans.h.
ROUTES = 24

_Tensors = tuple[torch.Tensor | None, ...]
_ALLOCATING = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


def routes_of(chosen: dict[str, str]) -> int:
    """The bits of a plan that hold the backend of each primitive; eager for what is not asked."""
    return sum(
        BACKENDS.index(chosen.get(primitive, "eager")) << ROUTES + 2 * i
        for i, primitive in enumerate(PRIMITIVES)
    )


def compute(
    plan: int, primitive: str, tensors: _Tensors, numbers: tuple[float, ...], noted: bool
) -> tuple[_Tensors, tuple | None]:
    """The results of a primitive by its backend in a plan, and the recipe; None if there is none.

    tensors, numbers: as csrc/host/recipe_backend.cpp gives them. noted: if a recipe is wanted.
    """
    place = PRIMITIVES.index("linear" if primitive == "base_product" else primitive)
    backend = dispatch.load(BACKENDS[plan >> ROUTES + 2 * place & 3])
    call = _CALLS[primitive]
    if not noted or any(devices.capturing(one) for one in tensors[:1] if one is not None):
        return tuple(call(backend, tensors, numbers)), None
    from lorafast.engine.kernels import launch

    notes = _Notes(tensors)
    with launch.noting(notes.launch), notes:
        results = tuple(call(backend, tensors, numbers))
    recipe = notes.recipe(results)
    if recipe is None and env.parse_log(env.raw_get(env.LOG_KEY)):
        dispatch.announce(f"{primitive} stays in Python: {notes.why}")
    return results, recipe


def tensor_map(address: int, told: tuple) -> bytes:
    """The tensor map of a descriptor whose tensor begins at an address. told: as in a recipe."""
    from lorafast.engine.kernels import launch, triton_internals

    dtype, shape, strides, block, meta = told
    descriptor = launch.descriptor_at(address, dtype, shape, strides, block)
    return triton_internals.tensor_map_bytes(descriptor, meta)


# ---------------------------------------------------------------------------------------------
# The primitives, by name: the operands and numbers of C++, and the results in its order.


def _project(backend: Any, tensors: _Tensors, numbers: tuple[float, ...]) -> Iterable:
    x, A, core, seed = tensors
    return backend.project(x, [DownProj(A, core, seed, numbers[0])])[0]


def _linear(backend: Any, tensors: _Tensors, numbers: tuple[float, ...]) -> Iterable:
    x, weight, h_core, B, out_scale, gain, bias = tensors
    scaling, keeps_inner = numbers
    up = UpProj(h_core, B, scaling, out_scale)
    return backend.linear(x, weight, [up], gain, bias, bool(keeps_inner))


def _base_product(backend: Any, tensors: _Tensors, numbers: tuple[float, ...]) -> Iterable:
    x, weight = tensors
    return backend.linear(x, weight, [])[:1]


def _grad_output(backend: Any, tensors: _Tensors, numbers: tuple[float, ...]) -> Iterable:
    dy, B, out_scale, core, h, gain, kept = tensors
    scaling, frozen_columns, *wanted, want_bias = numbers
    spec = UpProjGradSpec(
        B, scaling, out_scale, core, h, int(frozen_columns), *map(bool, wanted)
    )  # fmt: skip
    (own,), d_bias, dot, *_ = backend.grad_output(dy, [spec], gain, kept, bool(want_bias))
    return *own, d_bias, dot


def _grad_input(backend: Any, tensors: _Tensors, numbers: tuple[float, ...]) -> Iterable:
    dy, weight, gain, v, A, seed = tensors
    low_ranks = [] if v is None else [LowRankTerm(v, A, seed, numbers[0])]
    return [backend.grad_input([BaseTerm(dy, weight, gain)], low_ranks)]


def _grad_project(backend: Any, tensors: _Tensors, numbers: tuple[float, ...]) -> Iterable:
    x, v, seed = tensors
    # Of A no more is asked than its shape.
    A = torch.empty(v.shape[1], x.shape[-1], device="meta")
    return backend.grad_project(x, [LowRankTerm(v, A, seed, numbers[0])])


def _drop(backend: Any, tensors: _Tensors, numbers: tuple[float, ...]) -> Iterable:
    x, seed = tensors
    return [backend.drop(x, seed, numbers[0])]


def _row_norm(backend: Any, tensors: _Tensors, numbers: tuple[float, ...]) -> Iterable:
    weight, A, B = tensors
    scaling, by_row = numbers
    return [backend.row_norm(weight, A, B, scaling, "out" if by_row else "in")]


_CALLS: dict[str, Callable[[Any, _Tensors, tuple[float, ...]], Iterable]] = {
    "project": _project,
    "linear": _linear,
    "base_product": _base_product,
    "grad_output": _grad_output,
    "grad_input": _grad_input,
    "grad_project": _grad_project,
    "drop": _drop,
    "row_norm": _row_norm,
}


# ---------------------------------------------------------------------------------------------
# Notes of a computation.


class _Place(NamedTuple):
    """Where a tensor lies. offset: in bytes, from the first one of its slot."""

    slot: int
    offset: int


class _Notes(torch_internals.DispatchMode):
    """What is computed in this context, as steps. why: why it is no recipe, "" if it is one.

    A slot is an operand, or a tensor that has been allocated or computed since; all others are
    views of one.
    """

    def __init__(self, operands: _Tensors) -> None:
        super().__init__()
        self.why, self.operands, self.slots = "", len(operands), 0
        self.steps: list[tuple] = []
        self.kernels: dict[int, object] = {}
        self.keepalive: list[object] = []
        self.device = next((one.device for one in operands if one is not None), None)
        # Weak, so that memory is free when it is in a call that nobody notes.
        self.places: Any = WeakTensorKeyDictionary()
        self.bases: dict[int, tuple] = {}
        for tensor in operands:
            if tensor is None:
                self.slots += 1
                continue
            if tensor in self.places or not tensor.numel():
                self._refuse("an operand is another one too, or empty")
            self._add(tensor)

    def recipe(self, results: _Tensors) -> tuple | None:
        """The recipe, as csrc/host/recipe.cpp reads it; None if there is none."""
        given = tuple([None if one is None else self._view(one) for one in results])
        if self.why:
            return None
        from lorafast.engine.kernels import gemm_routing, triton_internals

        watched = [
            *triton_internals.watched(),
            triton_internals.watched_driver(),
            (vars(gemm_routing), "_forced", None),
            *((kernel, "pre_run_hooks", None) for kernel in self.kernels.values()),
        ]
        try:
            address = cuda_driver.launch_address() if self.kernels else 0
        except Failure as failure:
            self._refuse(str(failure))
            return None
        return (
            address, self.operands, self.slots, tuple(self.steps), given, tuple(watched),
            self.keepalive,
        )  # fmt: skip

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not self.why:
            self._operation(func, args, kwargs or {}, out)
        return out

    def _operation(self, func: Any, args: tuple, kwargs: dict, out: object) -> None:
        """Note an operation of torch."""
        results: list[Any] = list(out) if isinstance(out, (tuple, list)) else [out]
        if not all(isinstance(one, torch.Tensor) for one in results):
            # A number of the operands would decide what follows.
            self._refuse(f"{func} gives no tensor")
            return
        schema = func._schema
        values = [
            args[i] if i < len(args) else kwargs.get(one.name, one.default_value)
            for i, one in enumerate(schema.arguments)
        ]
        first = next((one for one in values if isinstance(one, torch.Tensor)), None)
        new = [one for one in results if one not in self.places]
        if any(one.device.type == "meta" for one in new) or not (new or schema.is_mutable):
            return
        if func.overloadpacket.__name__ in _ALLOCATING:
            (made,) = new
            if made.device != self.device:
                self._refuse(f"{func} gives a tensor of another device")
            self._add(made)
            self.steps.append(
                ("allocate", self.slots - 1, tuple(made.shape), made.stride(), made.dtype)
            )
        elif not schema.is_mutable and new and first is not None and _same_memory(new, first):
            for one in new:
                self._add_view(one, first)
        else:
            self._computation(func, schema, values, results)

    def _computation(
        self, func: Any, schema: Any, values: list[Any], results: list[torch.Tensor]
    ) -> None:
        """Note an operation that computes."""
        if torch.Tag.nondeterministic_seeded in func.tags:
            self._refuse(f"{func} draws numbers")
            return
        for declared, value in zip(schema.arguments, values, strict=True):
            if declared.alias_info is not None and declared.alias_info.is_write:
                own = isinstance(value, torch.Tensor) and self._place(value).slot >= self.operands
                if not own:
                    self._refuse(f"{func} writes to an operand")
        noted = tuple([self._value(value) for value in values])
        made = []
        for one in results:
            made.append(-1 if one in self.places else self.slots)
            if made[-1] >= 0:
                self._add(one)
        self.steps.append(
            ("compute", schema.name, schema.overload_name, noted, tuple(made))
        )  # fmt: skip

    def _value(self, value: Any) -> Any:
        """An argument of an operation as C++ reads it: tensors are tuples, sequences are lists."""
        if isinstance(value, torch.Tensor):
            return self._view(value)
        if isinstance(value, (tuple, list)):
            return [self._value(one) for one in value]
        return value

    def launch(self, compiled: Any, kernel: Any, grid: tuple[int, ...], args: tuple) -> None:
        """Note a launch."""
        if compiled is None or compiled.passed is None:
            self._refuse(f"Triton launches {kernel.fn.__name__} itself")
        if self.why or not all(grid):
            return
        function, warps, shared, kinds = compiled.passed
        parameters: list[Any] = []
        for value, kind in zip(args, kinds, strict=True):
            if kind == "number":
                parameters.append(self._parameter(value))
            elif kind is not None:
                parameters += self._descriptor(value, kind)
        # Scratch memory, of which a kept kernel needs none.
        parameters += (0, 0)
        self.kernels[id(kernel)] = kernel
        self.keepalive.append(compiled)
        whole = (*grid, 1, 1)[:3]
        self.steps.append(("launch", function, 32 * warps, shared, whole, tuple(parameters)))

    def _parameter(self, value: Any) -> Any:
        """A number's bits, or where a tensor lies: its slot, and bytes from there."""
        if isinstance(value, torch.Tensor):
            slot, offset = self._place(value)
            return slot, offset
        if isinstance(value, float):
            return int.from_bytes(struct.pack("<f", value), "little")
        if type(value) is not int:
            self._refuse(f"a kernel takes a {type(value).__name__}")
            return 0
        return value

    def _descriptor(self, value: Any, meta: object) -> list[Any]:
        """The parameters that a descriptor becomes."""
        address = value.base.data_ptr()
        found = {
            self._parameter(tensor)
            for tensor in self.places
            if tensor.data_ptr() == address and tensor.dtype == value.base.dtype
        }
        if len(found) != 1:
            self._refuse("a descriptor is of several tensors, or of none")
            return []
        told = value.base.dtype, *map(tuple, (value.shape, value.strides, value.block_shape)), meta
        return [(*found.pop(), told), *value.shape, *value.strides]

    def _refuse(self, why: str) -> None:
        """Make no recipe; the first reason stays."""
        self.why = self.why or why

    def _add(self, tensor: torch.Tensor) -> None:
        """Give a tensor a slot of its own."""
        self.places[tensor] = _Place(self.slots, 0)
        self.bases[self.slots] = _layout(tensor)
        self.slots += 1

    def _add_view(self, view: torch.Tensor, of: torch.Tensor) -> None:
        """Note that a tensor is a view of another."""
        slot, offset = self._place(of)
        apart = int(view.storage_offset()) * view.itemsize - int(of.storage_offset()) * of.itemsize
        self.places[view] = _Place(slot, offset + apart)

    def _place(self, tensor: torch.Tensor) -> _Place:
        found = self.places.get(tensor)
        if found is None:
            self._refuse("a tensor is of an unknown origin")
            return _Place(-1, 0)
        return found

    def _view(self, tensor: torch.Tensor) -> tuple:
        """A tensor as C++ reads it: its slot, and what makes a view of it, if it is one."""
        slot, offset = self._place(tensor)
        if (own := _layout(tensor)) == self.bases.get(slot) and not offset:
            return (slot,)
        return slot, offset, *own


def _layout(tensor: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...], torch.dtype]:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype


def _same_memory(tensors: list[torch.Tensor], other: torch.Tensor) -> bool:
    """True if all tensors lie in the storage of another one."""
    own = torch_internals.storage_key(other)
    return all(torch_internals.storage_key(one) == own for one in tensors)
