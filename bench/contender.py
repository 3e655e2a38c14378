"""One implementation of one layer: the module, the problem it solves, and its parameters by the names the truth has for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

import lorafast
from lorafast.bench import compiled, peers
from lorafast.bench.impl import Impl
from lorafast.bench.refusal import Unable
from lorafast.bench.textbook import TRAINS, EagerLinear
from lorafast.engine import philox
from lorafast.methods.adapter import Adapter
from lorafast.testing import SHORT, Case, Form

# Which part of the formula each Parameter of a lorafast.Linear is.
PARTS = {
    "lora_A": "lora_A",
    "lora_B": "lora_B",
    "lora_core": "core",
    "lora_magnitude": "magnitude",
    "lora_out_scale": "out_scale",
    "lora_bias": "lora_bias",
}


class Problem(NamedTuple):
    """One layer under one load. s = 2."""

    K: int
    N: int
    R: int
    M: int
    dropout: float
    dtype: torch.dtype
    device: torch.device
    bias: bool = False

    def __str__(self) -> str:
        return f"{self.K}x{self.N} R={self.R} M={self.M} p={self.dropout:g} {SHORT[self.dtype]}"


@dataclass
class Contender:
    """module(x) is what is measured. parameters: all the truth knows, by its names; trained: x and those that must get a gradient.

    astray: those that ask for a gradient and must not. frozen: how many columns of lora_B are frozen.
    A stand_in draws the truth's dropout mask where the real one would draw its own: it can be judged, and is not timed.
    """

    impl: Impl
    method: str
    module: Callable[[torch.Tensor], torch.Tensor]
    layer: nn.Module
    case: Case
    parameters: dict[str, torch.Tensor]
    trained: tuple[str, ...]
    route: str
    astray: tuple[str, ...] = ()
    stand_in: bool = False
    frozen: int = 0

    @torch.no_grad()
    def load(self, tensors: dict[str, torch.Tensor | None]) -> None:
        """Take the values of a made problem."""
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[name])

    def outcome(
        self, tensors: dict[str, torch.Tensor | None], draw: int
    ) -> dict[str, torch.Tensor]:
        """y and every gradient of one step, with the mask that `seed_of(draw)` stands for."""
        self.load(tensors)
        x = tensors["x"].detach().requires_grad_()
        self.clear()
        torch.manual_seed(draw)
        y = self.module(x)
        y.backward(tensors["dy"])
        grads = {name: self.parameters[name].grad for name in self.trained if name != "x"}
        self.clear()
        return {"y": y.detach(), "x": x.grad} | grads

    def freeze(self, count: int) -> None:
        """Freeze the first columns of lora_B, as LaMDA's schedule does; all of them, and it asks for no gradient any more."""
        self.layer.freeze_columns(count)
        self.frozen = count
        kept = tuple(name for name in self.trained if name != "lora_B")
        self.trained = kept if count == self.case.R else (*kept, "lora_B")

    def clear(self) -> None:
        """Forget gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None


def seed_of(draw: int, device: torch.device) -> torch.Tensor:
    """The dropout seed the first layer draws after torch.manual_seed(draw)."""
    torch.manual_seed(draw)
    return philox.draw(device)


def build(
    impl: Impl, method: str, adapter: Adapter | None, problem: Problem, weight: torch.Tensor, bias: torch.Tensor | None,
    mask: bool = False,
) -> Contender:  # fmt: skip
    """A contender on the given weight, which it shares. mask=True builds a stand-in where its own dropout mask cannot be known.

    Raises Unable.
    """
    linear = nn.Linear(problem.K, problem.N, bias is not None, device="meta")
    trains = impl.base == "full"
    linear.weight = nn.Parameter(weight.detach(), requires_grad=trains)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=trains)
    path = "torch"
    if not impl.adapts:
        layer = linear
    elif impl.by_peft:
        peers.check(impl, method, problem.dtype)
        layer = peers.layer(linear, impl, method, adapter)
        if mask and not impl.ours:
            peers.mask(layer)
    else:
        try:
            layer = lorafast.Linear.from_linear(linear, adapter)
        except ValueError as error:  # a rank the shape has no room for
            raise Unable("unsupported", str(error)) from None
        if impl.base == "eager":
            layer = _by_hand(impl, method, adapter, linear, parts_of(layer), mask)
    if impl.ours:
        path = route(layer, problem.M)
    parts = parts_of(layer)
    parameters = {"weight": linear.weight} | ({} if bias is None else {"bias": linear.bias}) | parts
    if unknown := [
        name
        for name, p in layer.named_parameters()
        if all(p is not known for known in parameters.values())
    ]:
        raise NotImplementedError(f"the truth has no {', '.join(unknown)}")
    must = TRAINS[method] if impl.adapts else frozenset(("weight", "bias") if trains else ())
    trained = ("x", *(name for name in parameters if name in must))
    astray = tuple(
        name
        for name, parameter in parameters.items()
        if parameter.requires_grad and name not in must
    )
    stand_in = mask and problem.dropout > 0 and impl.adapts and (not impl.ours or impl.compile)
    module = compiled.compiled(layer, torchs_draws=stand_in) if impl.compile else layer
    case = Case(
        form_of(impl, method, adapter, parts), problem.M, problem.N, problem.K, problem.R, problem.dtype,
        problem.dropout if parts else 0.0, bias is not None,
        adapter.scaling if parts else 1.0, parts["lora_A"].dtype if parts else None,
    )  # fmt: skip
    return Contender(
        impl,
        method,
        module,
        layer,
        case,
        parameters,
        trained,
        "inductor" if impl.compile else path,
        astray,
        stand_in,
    )


def parts_of(layer: nn.Module) -> dict[str, nn.Parameter]:
    """The factors of a layer, ours or PEFT's, by the names lorafast.linear gives them; none of a bare one."""
    if isinstance(layer, lorafast.Linear):
        return {
            part: getattr(layer, name)
            for name, part in PARTS.items()
            if getattr(layer, name) is not None
        }
    held = dict(layer.named_parameters())
    names = (
        {name: name for name in PARTS.values()} if isinstance(layer, EagerLinear) else peers.NAMES
    )
    return {part: held[name] for part, name in names.items() if name in held}


def _by_hand(
    impl: Impl,
    method: str,
    adapter: Adapter,
    linear: nn.Linear,
    parts: dict[str, nn.Parameter],
    mask: bool,
) -> EagerLinear:
    """The chain on factors of our start; which of them train, the papers say."""
    for name, parameter in parts.items():
        parameter.requires_grad_(name in TRAINS[method])
    return EagerLinear(
        form_of(impl, method, adapter, parts), adapter.scaling, adapter.dropout, linear, parts, mask
    )


def form_of(
    impl: Impl, method: str, adapter: Adapter | None, parts: dict[str, torch.Tensor]
) -> Form:
    """The part of the formula a contender with these parts computes."""
    if not parts:
        return Form(impl.base)
    core = {None: "none", 1: "diagonal", 2: "full"}[
        parts["core"].dim() if "core" in parts else None
    ]
    dropout_on = adapter.dropout_on
    if impl.by_peft and "magnitude" in parts and adapter.dropout:
        dropout_on = peers.DROPOUT_ON
    elif impl.base == "eager" and not adapter.dropout:
        dropout_on = "adapter"  # nobody types a second product of the same x
    return Form(
        method, core, "magnitude" in parts, adapter.axis, dropout_on, "auto",
        "out_scale" in parts, "lora_bias" in parts, adapter.detach_norm,
    )  # fmt: skip


def route(layer: nn.Module, M: int) -> str:
    """The backend of every primitive, in a word if it is one."""
    (row,) = lorafast.explain(layer, tokens=M).rows
    used = set(row.backends.values())
    return used.pop() if len(used) == 1 else ", ".join(f"{p}: {b}" for p, b in row.backends.items())
