"""What the optimizers over whole weights ask of a model: which weights, and a hook that frees a gradient."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lorafast.engine import checks
from lorafast.methods.lora import LoRA
from lorafast.models.adapt_spec import Names, Plan
from lorafast.models.module_names import clean, unwrapped
from lorafast.models.target_modules import is_conv1d, select
from lorafast.nn.adapter_layer import AdapterLayer


class Target(NamedTuple):
    """The weight of one linear, by its (first) clean name. transposed: it lies as [K,N], as transformers' Conv1D has it."""

    name: str
    weight: nn.Parameter
    transposed: bool
    adapted: bool

    def matrix(self, tensor: torch.Tensor) -> torch.Tensor:
        """The weight, or a tensor of its shape, as [N,K]."""
        return tensor.t() if self.transposed else tensor


def chosen(model: nn.Module, target_modules: Names, exclude_modules: Names | None) -> list[Target]:
    """The weights that names mean as lorafast.adapt reads them, in module order, each once. ValueError or TypeError as there."""
    model = unwrapped(model)
    names, found = select(model, Plan(LoRA(), target_modules, exclude_modules)), {}
    for name, module in model.named_modules(remove_duplicate=False):
        if name not in names:
            continue
        transposed = is_conv1d(module)
        if not (transposed or isinstance(module, nn.Linear)):
            raise TypeError(
                f"target_modules={target_modules!r} matches {name}, a {type(module).__name__} and no linear"
            )
        if not isinstance(module.weight, nn.Parameter):
            raise TypeError(
                f"{name}.weight is a {type(module.weight).__name__} and no Parameter: it cannot be trained"
            )
        checks.pair(f"{name}.weight", module.weight, "[N, K]")
        if hasattr(module.weight, "full_tensor"):
            raise NotImplementedError(
                f"{name}.weight {tuple(module.weight.shape)} is a sharded DTensor"
            )
        found.setdefault(
            module.weight,
            Target(clean(name), module.weight, transposed, isinstance(module, AdapterLayer)),
        )
    return list(found.values())


def refuse_parallel(model: nn.Module) -> None:
    """DDP sums gradients when all of a bucket are there, which a hook on each would not wait for."""
    if isinstance(model, DistributedDataParallel):
        raise ValueError(
            f"per_layer=True: {type(model).__name__} needs every gradient until all are summed; use per_layer=False"
        )


def on_gradient(
    optimizer: Optimizer, parameter: nn.Parameter, method: Callable[..., None], *args: object
) -> RemovableHandle:
    """Call method(optimizer, parameter, *args) whenever backward has the parameter's gradient, and free that gradient then.

    The parameter keeps nobody alive: once the optimizer is gone, nothing is called.
    """
    held = weakref.ref(optimizer)

    @torch.no_grad()
    def hook(parameter: nn.Parameter) -> None:
        if (owner := held()) is not None and parameter.grad is not None:
            method(owner, parameter, *args)
            parameter.grad = None

    return parameter.register_post_accumulate_grad_hook(hook)
