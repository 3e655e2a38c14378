"""The modelled time of a layer's training step on a GPU, and of the frozen layer's. No measurement.

The step runs on meta tensors, which stand for those of the GPU meanwhile: torch's operations are
noted as they come by, and launches of the kernels where they would be made. Nothing is computed, no
GPU is asked, and triton is not imported.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from lorafast.engine import dispatch, formula, kernel_choice, masks, norm_grads, trial
from lorafast.engine.backends import cuda, eager
from lorafast.engine.kernels import gpu_specs, measured, modelled
from lorafast.engine.kernels.modelled import Machine, Work
from lorafast.engine.modelled_forms import ModelledForms
from lorafast.engine.modelled_launches import ModelledKernels
from lorafast.engine.problem import PRIMITIVES, CallOptions, GradMask, LayerTensors, Problem
from lorafast.runtime import devices, env, torch_internals
from lorafast.runtime.devices import StandIn
from lorafast.runtime.fallback import Provisional
from lorafast.runtime.torch_internals import DispatchMode

# A primitive is served by the kernels where they take at most this share of eager's time.
WORTH = measured.GAIN
# More tokens are modelled as so many: beyond, a step's ratio to the frozen layer's does not change.
MOST_TOKENS = 1 << 15
HALVES = (torch.bfloat16, torch.float16)

# Operations that launch nothing.
_VIEWS = frozenset(
    {
        "_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "empty", "empty_like",
        "empty_strided", "expand", "new_empty", "new_empty_strided", "permute", "select", "slice",
        "split", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view",
    }
)  # fmt: skip
_PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "addmm_": 1, "baddbmm": 1}
# What the cuda backend has beside primitives, and the one that it is priced with.
_WITH = {
    "gain_of": "grad_output", "gain_grads": "grad_output", "LINEAR_DIVIDES": "linear",
    "GRAD_OUTPUT_DIVIDES": "grad_output",
}  # fmt: skip
_OVERWRITES = ("copy_", "fill_", "zero_", "normal_", "uniform_", "random_")


class Trace(DispatchMode):
    """The operations and launches of what runs inside on meta tensors, in order."""

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self.machine = machine
        self.works: list[Work] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = function._schema.name.split("::")[1]
        if name not in _VIEWS and function.namespace == "aten":
            self.works.append(_operation(name, args, kwargs, result, self.machine))
        return result

    @property
    def seconds(self) -> float:
        """The modelled time of everything."""
        return sum(work.seconds + modelled.GAP for work in self.works)


def _operation(name: str, args: tuple, kwargs: dict, result: object, machine: Machine) -> Work:
    tensors = list(_tensors((args, kwargs)))
    read = [tensor for tensor in tensors if tensor is not kwargs.get("out")]
    if name in _OVERWRITES or (name == "addmm_" and kwargs.get("beta", 1) == 0):
        read = read[1:]
    moved = sum(map(modelled.bytes_of, (*read, *_tensors(result))))
    flops, dtype = 0, torch.float32
    if name in _PRODUCTS:
        a, b = [t for t in tensors if t is not kwargs.get("out")][_PRODUCTS[name] :][:2]
        flops, dtype = 2 * math.prod(a.shape) * b.shape[-1], a.dtype
    return modelled.operation(name, moved, flops, dtype, machine.specs)


def _tensors(value: object) -> Iterator[torch.Tensor]:
    """Yield the tensors in arguments or in a result, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _tensors(one)


class Part(NamedTuple):
    """The shape, strides and dtype of a tensor."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def of(tensor: torch.Tensor) -> Part:
        """The part that a tensor is."""
        return Part(tuple(tensor.shape), tensor.stride(), tensor.dtype)

    def meta(self) -> torch.Tensor:
        """Return a meta tensor of this kind."""
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device="meta")


class Layer(NamedTuple):
    """One layer and its call in a training step.

    M: tokens. parts: those of LayerTensors, in order. options: with keep resolved.
    """

    M: int
    parts: tuple[Part | None, ...]
    options: CallOptions
    needs: GradMask

    @property
    def weight(self) -> Part:
        """The base weight."""
        return self.parts[0]


class Chosen:
    """A backend of which each primitive is the kernels', the cuda backend's or eager's.

    served: the primitives of the kernels; None: those for which the model gives them at most WORTH
    of eager's time. by_cuda: those of the cuda backend. took: which way each primitive went.
    """

    def __init__(
        self, trace: Trace, served: frozenset[str] | None, by_cuda: frozenset[str]
    ) -> None:
        self.trace, self.served, self.by_cuda = trace, served, by_cuda
        self.kernels = ModelledKernels(trace.works.append, trace.machine)
        self.took: dict[str, str] = {}

    def __getattr__(self, primitive: str) -> Callable:
        served_with = _WITH.get(primitive, primitive)
        if served_with in self.by_cuda:
            if served_with == primitive:
                self.took[primitive] = "cuda"
            return getattr(cuda, primitive)
        if served_with != primitive or primitive not in (*PRIMITIVES, "drop"):
            # What a backend may lack.
            raise AttributeError(primitive)
        if self.served is None:
            return functools.partial(self._better, primitive)
        self.took[primitive] = "kernels" if primitive in self.served else "torch"
        return getattr(self.kernels if primitive in self.served else eager, primitive)

    def _better(self, primitive: str, *args, **kwargs):
        before, tried = list(self.trace.works), []
        for backend in (eager, self.kernels):
            self.trace.works.clear()
            result = getattr(backend, primitive)(*args, **kwargs)
            tried.append((self.trace.seconds, list(self.trace.works), result))
        kernels_win = tried[1][0] <= WORTH * tried[0][0]
        self.took[primitive] = "kernels" if kernels_win else "torch"
        _, works, result = tried[kernels_win]
        self.trace.works[:] = before + works
        return result


class Step(NamedTuple):
    """A modelled step: its seconds, and which way each primitive went ("kernels", "cuda" or
    "torch").
    """

    seconds: float
    took: dict[str, str]


@functools.lru_cache(maxsize=1024)
def step(
    layer: Layer,
    machine: Machine,
    served: frozenset[str] | None,
    mask: bool,
    by_cuda: frozenset[str] = frozenset(),
) -> Step:
    """Return the modelled step of an adapted layer.

    served: the primitives that Triton's kernels compute; None: those that the model prefers. mask:
    True if the kernel of the dropout mask serves where torch's operations compute. by_cuda: the
    primitives that the cuda backend computes; its own functions run, and what they would launch is
    noted. ValueError for a launch of its whose form is not counted: those of 16 bits and up to 16
    ranks are, with dense rows and no z kept.
    """
    trace = Trace(machine)
    chosen = Chosen(trace, served, by_cuda)
    drop = chosen.kernels.drop_into if mask else None
    forms = ModelledForms(trace.works.append, machine.specs)
    _take_step(layer, trace, StandIn(machine.arch, chosen, drop, forms.launch))
    return Step(trace.seconds, chosen.took)


def cuda_step(layer: Layer, machine: Machine) -> float:
    """Return the modelled seconds of an adapted layer's step by the cuda backend alone, as step."""
    return step(layer, machine, frozenset(), False, frozenset((*PRIMITIVES, "drop"))).seconds


def _take_step(layer: Layer, trace: Trace, stand_in: StandIn) -> None:
    """Note what a layer's forward and backward pass do."""
    (N, K), dtype, options = layer.weight.shape, layer.weight.dtype, layer.options
    with _modelling(stand_in), torch.no_grad():
        tensors = LayerTensors(*(part and part.meta() for part in layer.parts))
        x, dy = (torch.empty(layer.M, size, dtype=dtype, device="meta") for size in (K, N))
        with trace:
            if tensors.magnitude is not None:
                tensors = tensors._replace(norm=formula.row_norm(tensors, options))
            y, h, z = formula.forward(x, tensors, options)
            kept = y if options.keep == "output" else z
            grads = formula.backward(dy, x, h, kept, tensors, options, layer.needs)
            if layer.needs.norm:
                of_norm = GradMask(lora_A=layer.needs.lora_A, lora_B=layer.needs.lora_B)
                d_norm = grads[GradMask._fields.index("norm")]
                norm_grads.row_norm_backward(d_norm, tensors.norm, tensors, options, of_norm)


@functools.lru_cache(maxsize=1024)
def frozen(M: int, weight: Part, bias: bool, machine: Machine) -> float:
    """Return the modelled seconds of the frozen layer's step: y, and the gradient of x."""
    N, K = weight.shape
    layer = nn.Linear(K, N, bias, "meta", weight.dtype).requires_grad_(False)
    return of_call(layer, (), M, weight, machine)


def of_call(
    call: Callable, trained: Sequence[torch.Tensor], M: int, weight: Part, machine: Machine
) -> float:
    """Return the modelled seconds of a forward and backward pass of a call on meta tensors.

    Where a gradient goes is not counted. trained: what gets one, beside x.
    """
    (N, K), dtype = weight.shape, weight.dtype
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.empty(M, K, dtype=dtype, device="meta", requires_grad=True)
        dy = torch.empty(M, N, dtype=dtype, device="meta")
        with Trace(machine) as trace:
            torch.autograd.grad(call(x), [x, *trained], dy)
    return trace.seconds


@contextlib.contextmanager
def _modelling(stand_in: StandIn) -> Iterator[None]:
    token = devices.stand_in.set(stand_in)
    try:
        with torch.inference_mode(False):
            yield
    finally:
        devices.stand_in.reset(token)


def layer_of(M: int, tensors: LayerTensors, options: CallOptions, needs: GradMask) -> Layer:
    """Return the layer that the tensors make; a seed and a norm need not be there."""
    seed = torch.empty(1, dtype=torch.int64, device="meta") if options.dropout else None
    parts = tensors._replace(norm=None, seed=seed)
    scaling: Any = 2.0 if isinstance(options.scaling, torch.Tensor) else options.scaling
    return Layer(
        min(M, MOST_TOKENS),
        tuple(None if one is None else Part.of(one) for one in parts),
        options._replace(scaling=scaling),
        needs,
    )


def machine_of(device: torch.device, dtype: torch.dtype) -> Machine | None:
    """Return a device as the model knows it; None for what is no GPU, or one of unknown rates.

    What a trial has measured is in the place of what is published. No trial is run.
    """
    arch = devices.of(device)
    if arch.vendor in ("cpu", "meta") or dtype not in HALVES:
        return None
    rates = getattr(trial.known(device, "streams"), "rates", {})
    if arch.name not in gpu_specs.DEVICES and measured.COPY not in rates:
        return None
    routing = kernel_choice.measured_specs(device, arch, dtype)
    return Machine(arch, routing or gpu_specs.device(arch), routing)


class ModelledStep(NamedTuple):
    """A layer's step on its GPU as it is served there. lasts: False if that may change soon."""

    layer: Layer
    machine: Machine
    seconds: float
    lasts: bool


def modelled_step(
    M: int, tensors: LayerTensors, options: CallOptions, needs: GradMask
) -> ModelledStep | None:
    """Return the modelled step of a layer by the backends that serve it. options: keep resolved.

    What `step` does not price of the cuda backend is priced as what would serve otherwise, and is
    quicker than that.

    None on what is no GPU, for other dtypes than bf16 and fp16, where a forced backend refuses or
    is not priced, and inside a dispatch mode, which would see the model's operations. The first
    question about a GPU runs its trial.
    """
    weight = tensors.weight
    device, dtype = weight.device, weight.dtype
    if devices.of(device).vendor in ("cpu", "meta") or dtype not in HALVES:
        return None
    if torch_internals.dispatch_modes_active():
        return None
    asked = _problems(M, tensors, options)
    backends, lasts = _backends(asked)
    mask = bool(options.dropout) and masks.kernel_serves(device, dtype)
    # After the trial that the choice of a backend may have run.
    machine = machine_of(device, dtype)
    if machine is None or "none" in backends.values():
        return None
    layer = layer_of(M, tensors, options, needs)
    try:
        seconds = _seconds_by(layer, machine, backends, mask)
    except ValueError:
        if env.is_forced("cuda"):
            return None
        otherwise = {name: _without_cuda(name, problem) for name, problem in asked.items()}
        seconds = _seconds_by(layer, machine, otherwise, mask)
    return ModelledStep(layer, machine, seconds, lasts)


def _seconds_by(layer: Layer, machine: Machine, backends: dict[str, str], mask: bool) -> float:
    """The modelled seconds of a step of which each primitive has its backend."""
    served, by_cuda = (
        frozenset(name for name, backend in backends.items() if backend == wanted)
        for wanted in ("triton", "cuda")
    )
    return step(layer, machine, served, mask, by_cuda).seconds


def _without_cuda(primitive: str, problem: Problem) -> str:
    """The backend of a primitive on a GPU if the cuda backend refuses."""
    return "eager" if dispatch.why_not("triton", primitive, problem) else "triton"


def ratio(M: int, tensors: LayerTensors, options: CallOptions, needs: GradMask) -> float | None:
    """Return the modelled time of a layer's step by the frozen layer's; None as modelled_step."""
    found = modelled_step(M, tensors, options, needs)
    if found is None:
        return None
    layer, machine, seconds, _ = found
    return seconds / frozen(layer.M, layer.weight, tensors.bias is not None, machine)


def _problems(M: int, tensors: LayerTensors, options: CallOptions) -> dict[str, Problem]:
    """The problem of each primitive of a step."""
    x = tensors.weight.new_empty(0, tensors.weight.shape[1])
    problem = replace(dispatch.problem_of(x, tensors, options), M=M)
    asked = dict.fromkeys(PRIMITIVES, problem)
    del asked["row_norm"]
    if tensors.magnitude is not None:
        asked["row_norm"] = dispatch.norm_problem_of(tensors, options)
        if options.drops_base:
            asked["drop"] = problem
    return asked


def _backends(asked: dict[str, Problem]) -> tuple[dict[str, str], bool]:
    """The backend of each primitive of a step, and False if a refusal is Provisional."""
    backends, lasts = {}, True
    for primitive, one in asked.items():
        backends[primitive], refusals = dispatch.choice(primitive, one)
        reasons = itertools.chain(*refusals.values())
        lasts &= not any(isinstance(reason, Provisional) for reason in reasons)
    return backends, lasts
