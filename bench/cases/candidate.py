"""A candidate: one implementation of one method on one layer.

Its parameters have the names of lorafast.linear's arguments, which the truth uses too.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

import lorafast
from lorafast.bench.cases import peft_baseline
from lorafast.bench.cases.expected_grads import TRAINED, EagerLinear
from lorafast.bench.cases.implementations import Impl
from lorafast.bench.errors import Unavailable
from lorafast.bench.measure import compiled
from lorafast.methods.adapter import Adapter
from lorafast.nn.linear import AdapterLinearBase
from lorafast.testing import SHORT, Case, Form

# The argument of lorafast.linear for each Parameter of lorafast's linears.
ARGUMENTS = {
    "lora_A": "lora_A",
    "lora_B": "lora_B",
    "lora_core": "core",
    "lora_magnitude": "magnitude",
    "lora_out_scale": "out_scale",
    "lora_bias": "lora_bias",
}


class Problem(NamedTuple):
    """One layer with one number of tokens.

    inference: a forward in eval mode without gradients; else a training step.
    """

    K: int
    N: int
    R: int
    M: int
    dropout: float
    dtype: torch.dtype
    device: torch.device
    bias: bool = False
    inference: bool = False

    def __str__(self) -> str:
        what = "inference" if self.inference else f"p={self.dropout:g}"
        return f"{self.K}x{self.N} R={self.R} M={self.M} {what} {SHORT[self.dtype]}"


@dataclass
class Candidate:
    """A layer to check and to measure; module(x) is the call.

    parameters: every parameter that the truth has, by its name there.
    trained: x and the parameters that must get a gradient; none in inference.
    wrongly_trained: the parameters that require a gradient although they must not.
    for_checking: the layer uses the truth's dropout mask instead of its own; it is not timed.
    frozen_columns: the number of frozen columns of lora_B.
    """

    impl: Impl
    method: str
    module: Callable[[torch.Tensor], torch.Tensor]
    layer: nn.Module
    case: Case
    parameters: dict[str, torch.Tensor]
    trained: tuple[str, ...]
    route: str
    wrongly_trained: tuple[str, ...] = ()
    for_checking: bool = False
    frozen_columns: int = 0

    @torch.no_grad()
    def load(self, tensors: dict[str, torch.Tensor | None]) -> None:
        """Copy these values into the parameters."""
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[name])

    def outputs_and_grads(
        self, tensors: dict[str, torch.Tensor | None], draw: int
    ) -> dict[str, torch.Tensor]:
        """Return y and every gradient of one step, with the mask of first_seed(draw)."""
        self.load(tensors)
        if not self.trained:
            with torch.no_grad():
                return {"y": self.module(tensors["x"])}
        x = tensors["x"].detach().requires_grad_()
        self.clear_grads()
        torch.manual_seed(draw)
        y = self.module(x)
        y.backward(tensors["dy"])
        grads = {name: self.parameters[name].grad for name in self.trained if name != "x"}
        self.clear_grads()
        return {"y": y.detach(), "x": x.grad} | grads

    def freeze(self, count: int) -> None:
        """Freeze the first columns of lora_B, as LaMDA's schedule does.

        With all of them frozen, lora_B requires no gradient.
        """
        self.layer.freeze_columns(count)
        self.frozen_columns = count
        others = tuple(name for name in self.trained if name != "lora_B")
        self.trained = others if count == self.case.R else (*others, "lora_B")

    def clear_grads(self) -> None:
        """Set every gradient to None."""
        for parameter in self.parameters.values():
            parameter.grad = None


def build(
    impl: Impl,
    method: str,
    adapter: Adapter | None,
    problem: Problem,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    for_checking: bool = False,
) -> Candidate:
    """Return a candidate that shares the given weight and bias.

    for_checking: use the truth's dropout mask where the layer's own mask cannot be known.
    Raises Unavailable.
    """
    linear = _linear(problem, weight, bias, trains=impl.base == "full")
    layer = _layer(impl, method, adapter, problem, linear, for_checking)
    layer.train(not problem.inference)
    factors = adapter_parameters(layer)
    parameters = _parameters(layer, linear, factors)
    if impl.has_adapter:
        expected = TRAINED[method]
    else:
        expected = frozenset(("weight", "bias") if impl.base == "full" else ())
    other_mask = for_checking and problem.dropout > 0 and impl.has_adapter
    other_mask = other_mask and (impl.compile or not _drops_as_lorafast(impl, problem, layer))
    trained = ("x", *(name for name in parameters if name in expected))
    path = route(layer, problem.M) if impl.uses_lorafast else "torch"
    return Candidate(
        impl,
        method,
        compiled.compile_module(layer, torch_random=other_mask) if impl.compile else layer,
        layer,
        _case(impl, method, adapter, problem, factors, has_bias=bias is not None),
        parameters,
        trained=() if problem.inference else trained,
        route="inductor" if impl.compile else path,
        wrongly_trained=tuple(
            name
            for name, parameter in parameters.items()
            if parameter.requires_grad and name not in expected
        ),
        for_checking=other_mask,
    )


def _linear(
    problem: Problem, weight: torch.Tensor, bias: torch.Tensor | None, trains: bool
) -> nn.Linear:
    linear = nn.Linear(problem.K, problem.N, bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=trains)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=trains)
    return linear


def _layer(
    impl: Impl,
    method: str,
    adapter: Adapter | None,
    problem: Problem,
    linear: nn.Linear,
    for_checking: bool,
) -> nn.Module:
    """Return the layer of an implementation on top of the linear layer."""
    if impl.base == "full" and problem.inference:
        raise Unavailable("unsupported", "in inference it is the frozen layer")
    if not impl.has_adapter:
        return linear
    if impl.built_by_peft:
        peft_baseline.check_available(impl, method, problem.dtype)
        layer = peft_baseline.peft_layer(linear, impl, method, adapter)
        if for_checking and not _drops_as_lorafast(impl, problem, layer):
            peft_baseline.use_seeded_dropout(layer)
        return layer
    try:
        with warnings.catch_warnings():
            # A rank above the sizes is what was asked for.
            warnings.filterwarnings("ignore", "r exceeds", UserWarning)
            layer = lorafast.Linear.from_linear(linear, adapter)
    except ValueError as error:  # the rank is too large for the shape
        raise Unavailable("unsupported", str(error)) from None
    if impl.base == "eager":
        factors = adapter_parameters(layer)
        return _eager_layer(impl, method, adapter, linear, factors, for_checking)
    return layer


def _drops_as_lorafast(impl: Impl, problem: Problem, layer: nn.Module) -> bool:
    """True if the layer's dropout draws lorafast's bits."""
    if impl.base != "accelerated" or problem.device.type != "cpu":
        return impl.uses_lorafast
    return not peft_baseline.runs_pefts_forward(layer, problem.M, problem.dtype)


def _eager_layer(
    impl: Impl,
    method: str,
    adapter: Adapter,
    linear: nn.Linear,
    factors: dict[str, nn.Parameter],
    for_checking: bool,
) -> EagerLinear:
    """Return the eager chain on lorafast's initial factors; TRAINED says which of them train."""
    for name, parameter in factors.items():
        parameter.requires_grad_(name in TRAINED[method])
    form = form_of(impl, method, adapter, factors)
    return EagerLinear(form, adapter.scaling, adapter.dropout, linear, factors, for_checking)


def _parameters(
    layer: nn.Module, linear: nn.Linear, factors: dict[str, nn.Parameter]
) -> dict[str, torch.Tensor]:
    """Return all parameters by the truth's names. NotImplementedError if the truth lacks one."""
    parameters = {"weight": linear.weight}
    if linear.bias is not None:
        parameters["bias"] = linear.bias
    parameters |= factors
    known = {id(parameter) for parameter in parameters.values()}
    unknown = [name for name, p in layer.named_parameters() if id(p) not in known]
    if unknown:
        raise NotImplementedError(f"the truth has no {', '.join(unknown)}")
    return parameters


def _case(
    impl: Impl,
    method: str,
    adapter: Adapter | None,
    problem: Problem,
    factors: dict[str, nn.Parameter],
    has_bias: bool,
) -> Case:
    form, p = form_of(impl, method, adapter, factors), problem
    if not factors:
        return Case(form, p.M, p.N, p.K, p.R, p.dtype, 0.0, has_bias, 1.0, None)
    factor_dtype = factors["lora_A"].dtype
    return Case(
        form, p.M, p.N, p.K, p.R, p.dtype, p.dropout, has_bias, adapter.scaling, factor_dtype
    )


def adapter_parameters(layer: nn.Module) -> dict[str, nn.Parameter]:
    """Return the adapter's parameters by the names of lorafast.linear's arguments.

    The layer is lorafast's, PEFT's or an EagerLinear; a layer without an adapter has none.
    """
    if isinstance(layer, AdapterLinearBase):
        held = {argument: getattr(layer, name) for name, argument in ARGUMENTS.items()}
        return {argument: value for argument, value in held.items() if value is not None}
    held = dict(layer.named_parameters())
    names = peft_baseline.PARAMETER_NAMES
    if isinstance(layer, EagerLinear):
        names = {argument: argument for argument in ARGUMENTS.values()}
    return {argument: held[name] for argument, name in names.items() if name in held}


def form_of(
    impl: Impl, method: str, adapter: Adapter | None, factors: dict[str, torch.Tensor]
) -> Form:
    """Return the parts of the formula that a layer with these adapter parameters computes."""
    if not factors:
        return Form(impl.base)
    core = "none"
    if "core" in factors:
        core = {1: "diagonal", 2: "full"}[factors["core"].dim()]
    dropout_on = adapter.dropout_on
    if impl.built_by_peft and "magnitude" in factors and adapter.dropout:
        dropout_on = peft_baseline.DROPOUT_ON
    elif impl.base == "eager" and not adapter.dropout:
        dropout_on = "adapter"  # without dropout a second product of x is the same product
    return Form(
        method,
        core,
        "magnitude" in factors,
        adapter.axis,
        dropout_on,
        "auto",
        "out_scale" in factors,
        "lora_bias" in factors,
        adapter.detach_norm,
    )


def route(layer: nn.Module, M: int) -> str:
    """Return the backend of every primitive, as one word if all have the same.

    "torch" where no primitive runs, as on few tokens.
    """
    (row,) = lorafast.explain(layer, tokens=M).rows
    used = set(row.backends.values()) or {"torch"}
    return used.pop() if len(used) == 1 else ", ".join(f"{p}: {b}" for p, b in row.backends.items())
