"""Gated MLPs, down(act(gate(x))⊙up(x)), whose product is computed again in backward.

The product is down's input, the widest activation of a transformer's block. An adapter on down
keeps its input for the gradient of lora_A. Here the outputs of gate and up are kept instead, which
the product's own backward needs anyway, and neither the product nor act(gate).
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from lorafast.runtime import torch_internals

Activation = Callable[[torch.Tensor], torch.Tensor]

# Activations of torch that are functions of each element, and of nothing else.
_STATELESS = frozenset(
    {
        nn.SiLU, nn.GELU, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.Mish, nn.Sigmoid, nn.Tanh,
        nn.Hardswish, nn.Hardsigmoid, nn.Softplus, nn.Identity,
    }
)  # fmt: skip


class Parts(NamedTuple):
    """The names of a gated MLP's children. up_first: up is called before gate."""

    gate: str
    up: str
    down: str
    act: str
    up_first: bool = False


class GatedMLP(nn.Module):
    """A gated MLP that keeps the outputs of gate and up for backward, and not their product.

    It stands before the class of the MLP in the bases of a subclass with the same name. Where torch
    traces or transforms the call, or no gradient is recorded, that class's own forward serves.
    """

    _plain_class: type[nn.Module]
    _plain_forward: Callable
    _parts: Parts

    def forward(self, *given: Any, **named: Any) -> torch.Tensor:
        """Return y [...,K] for x [...,K]."""
        if named or len(given) != 1 or not self._can_compute_again():
            return super().forward(*given, **named)
        (x,) = given
        *names, up_first = self._parts
        gate_proj, up_proj, down_proj, act = (self._modules[name] for name in names)
        # In the order of the class, in which layers draw the seeds of their dropout.
        up = up_proj(x) if up_first else None
        gate = gate_proj(x)
        up = up_proj(x) if up is None else up
        if not (gate.requires_grad or up.requires_grad) or gate.dtype != up.dtype:
            return down_proj(act(gate) * up)
        product = gated_product(gate, up, act)
        with computed_again(product, gate, up, act):
            return down_proj(product)

    def _can_compute_again(self) -> bool:
        """True if nothing would notice it, and a gradient is recorded."""
        act = self._modules[self._parts.act]
        return (
            torch.is_grad_enabled()
            # A library may have replaced the class's forward since.
            and self._plain_class.forward is self._plain_forward
            and "forward" not in vars(act)
            and not torch_internals.has_call_hooks(act)
            and not torch_internals.is_traced_or_transformed()
            and torch_internals.takes_saved_tensor_hooks()
            # Autocast may compute another activation in another dtype.
            and (is_exact(act) or not torch_internals.any_autocast())
        )

    def __reduce_ex__(self, protocol: Any) -> tuple:
        # The subclass is made when it is needed, so that pickle cannot find it by its name.
        return _blank, (self._plain_class,), self.__dict__


@functools.cache
def gated_class(plain_class: type[nn.Module]) -> type[GatedMLP]:
    """Return the subclass of a class of gated MLPs. ValueError if it is none."""
    parts = parts_of(plain_class)
    if parts is None:
        raise ValueError(f"{plain_class.__qualname__} is no gated MLP that lorafast knows")
    own = {
        "_plain_class": plain_class,
        "_plain_forward": staticmethod(plain_class.forward),
        "_parts": parts,
        "__module__": plain_class.__module__,
    }
    made = type(plain_class.__name__, (GatedMLP, plain_class), own)
    made.__qualname__ = plain_class.__qualname__
    return made


def _blank(plain_class: type[nn.Module]) -> GatedMLP:
    kind: Any = plain_class
    made = gated_class(kind)
    return made.__new__(made)


def parts_of(kind: type[nn.Module]) -> Parts | None:
    """Return the children that a forward combines as down(act(gate(x)) * up(x)), or None."""
    if inspect.unwrap(kind.forward) is not kind.forward:
        return None
    try:
        source = textwrap.dedent(inspect.getsource(kind.forward))
        (function,) = ast.parse(source).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    if not isinstance(function, ast.FunctionDef) or function.decorator_list:
        return None
    given = function.args
    arguments = [argument.arg for argument in given.args]
    others = given.vararg or given.kwarg or given.kwonlyargs or given.posonlyargs
    result = _returned(function)
    if len(arguments) != 2 or others or result is None:
        return None
    this, x = arguments
    down, product = _call_of_child(result, this)
    if not isinstance(product, ast.BinOp) or not isinstance(product.op, ast.Mult):
        return None
    for up_first, (left, right) in enumerate(
        ((product.left, product.right), (product.right, product.left))
    ):
        act, inner = _call_of_child(left, this)
        gate, gate_input = _call_of_child(inner, this)
        up, up_input = _call_of_child(right, this)
        inputs = [getattr(node, "id", None) for node in (gate_input, up_input)]
        if act and gate and up and inputs == [x, x]:
            return Parts(gate, up, down, act, bool(up_first))
    return None


def _returned(function: ast.FunctionDef) -> ast.expr | None:
    """The expression that a function returns, whose body is that, or `a = expression; return a`."""
    body = [node for node in function.body if not isinstance(node, ast.Expr)]
    *assigned, last = body or [None]
    if not isinstance(last, ast.Return) or len(assigned) > 1:
        return None
    if not assigned:
        return last.value
    (first,) = assigned
    if not isinstance(first, ast.Assign) or len(first.targets) != 1:
        return None
    (target,), returned = first.targets, last.value
    same = isinstance(target, ast.Name) and getattr(returned, "id", None) == target.id
    return first.value if same else None


def _call_of_child(node: ast.AST | None, this: str) -> tuple[str, ast.expr | None]:
    """The child's name and the argument of a node that is self.child(argument), else ("", None)."""
    if not isinstance(node, ast.Call) or len(node.args) != 1 or node.keywords:
        return "", None
    called = node.func
    if not isinstance(called, ast.Attribute) or getattr(called.value, "id", None) != this:
        return "", None
    return called.attr, node.args[0]


def gated_product(gate: torch.Tensor, up: torch.Tensor, act: Activation) -> torch.Tensor:
    """Return act(gate)⊙up, of which backward keeps gate and up alone.

    Its bits and those of its gradients are those of plain autograd.

    Args:
        gate: [...,N].
        up: [...,N].
        act: a function of each element, without parameters.

    Returns:
        The product [...,N].

    Example:
        from lorafast.nn.gated_mlp import gated_product

        gate, up = (torch.randn(4, 8, requires_grad=True) for _ in range(2))
        gated_product(gate, up, torch.nn.functional.silu).sum().backward()
    """
    return _GatedProduct.apply(act, gate, up)


class _GatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, act, gate, up):
        ctx.act = act
        ctx.save_for_backward(gate, up)
        return _product(gate, up, act)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_product):
        gate, up = ctx.saved_tensors
        d_up = _product(gate, d_product, ctx.act) if ctx.needs_input_grad[2] else None
        d_gate = None
        if ctx.needs_input_grad[1]:
            d_gate = _activation_grad(gate, d_product * up, ctx.act)
        return None, d_gate, d_up


def _product(gate: torch.Tensor, other: torch.Tensor, act: Activation) -> torch.Tensor:
    """act(gate)⊙other, in one new tensor where that is possible. Gradients are off."""
    activated = act(gate)
    own = activated.data_ptr() != gate.data_ptr() and activated.dtype == other.dtype
    return activated.mul_(other) if own else activated * other


def _activation_grad(gate: torch.Tensor, grad: torch.Tensor, act: Activation) -> torch.Tensor:
    """The gradient of gate through act. grad, that of act(gate), may be overwritten."""
    aten, approximate = torch.ops.aten, _gelu_form(act)
    # A mode may be there that forbids to write into what is given.
    if is_exact(act) and torch_internals.dispatch_modes_active():
        if approximate is None:
            return aten.silu_backward(grad, gate)
        return aten.gelu_backward(grad, gate, approximate=approximate)
    if _is_silu(act):
        return aten.silu_backward.grad_input(grad, gate, grad_input=grad)
    if approximate is not None:
        return aten.gelu_backward.grad_input(grad, gate, approximate=approximate, grad_input=grad)
    with torch.enable_grad():
        leaf = gate.detach().requires_grad_()
        (d_gate,) = torch.autograd.grad(act(leaf), leaf, grad)
    return d_gate


def is_exact(act: Activation) -> bool:
    """True for SiLU and GELU, which torch has kernels of, forward and backward."""
    return _is_silu(act) or _gelu_form(act) is not None


def why_not_activation(act: nn.Module) -> str:
    """Why an activation cannot be computed again, in words; "" if it can: it has no state."""
    kind = type(act)
    if next(act.parameters(), None) is not None or next(act.buffers(), None) is not None:
        return f"its activation {kind.__name__} has parameters"
    if getattr(act, "inplace", False):
        return f"its activation {kind.__name__} works in place"
    if kind in _STATELESS or (_of_transformers(act) and not act._modules):
        return ""
    return f"its activation {kind.__module__}.{kind.__qualname__} may have a state"


def _is_silu(act: Activation) -> bool:
    return type(act) is nn.SiLU or _of_transformers(act) == "SiLUActivation"


def _gelu_form(act: Activation) -> str | None:
    """The word for torch's gelu that the activation is, or None."""
    if type(act) is nn.GELU:
        return act.approximate
    inner = getattr(act, "act", None)
    if _of_transformers(act) == "GELUActivation" and inner is nn.functional.gelu:
        return "none"
    if _of_transformers(act) == "GELUTanh" and isinstance(inner, functools.partial):
        return "tanh"
    return None


def _of_transformers(act: Activation) -> str:
    """The name of an activation's class in transformers.activations, else ""."""
    kind = type(act)
    return kind.__qualname__ if kind.__module__ == "transformers.activations" else ""


class _Product(NamedTuple):
    """What is saved in the place of a product: its factors, as hooks outside have packed them."""

    gate: Any
    up: Any
    shape: torch.Size
    versions: tuple[int, int]


@contextlib.contextmanager
def computed_again(
    product: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, act: Activation
) -> Iterator[None]:
    """Yield in a context in which autograd saves gate and up in the place of product.

    Hooks on saved tensors that are active outside, such as those of checkpointing, get both of
    them, and everything else that is saved.
    """
    hooks = torch_internals.saved_tensor_hooks()
    outer_pack, outer_unpack = hooks or (torch.Tensor.detach, lambda packed: packed)
    address, count = product.data_ptr(), product.numel()
    version = torch_internals.version_of(product)
    factors, product_dtype = (gate.detach(), up.detach()), product.dtype

    def pack(tensor: torch.Tensor) -> Any:
        same = tensor.data_ptr() == address and tensor.numel() == count
        same = same and tensor.dtype == product_dtype and tensor.is_contiguous()
        # A hook on down may have changed its input.
        if not same or torch_internals.version_of(tensor) != version:
            return outer_pack(tensor) if hooks else tensor
        versions = torch_internals.version_of(factors[0]), torch_internals.version_of(factors[1])
        return _Product(outer_pack(factors[0]), outer_pack(factors[1]), tensor.shape, versions)

    def unpack(packed: Any) -> torch.Tensor:
        if not isinstance(packed, _Product):
            return outer_unpack(packed) if hooks else packed
        gate, up = outer_unpack(packed.gate), outer_unpack(packed.up)
        if not hooks:
            now = torch_internals.version_of(gate), torch_internals.version_of(up)
            if now != packed.versions:
                raise RuntimeError(
                    f"the output of gate or up {tuple(gate.shape)} of a gated MLP was modified in "
                    "place, but backward computes the input of down of it again; use "
                    "fuse_mlp=False"
                )
        with torch.no_grad():
            return _product(gate, up, act).view(packed.shape)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
