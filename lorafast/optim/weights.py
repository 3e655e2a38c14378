"""The weights of targeted linears, and hooks on their gradients: for GaLore and LoRAAsOptimizer."""

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
from lorafast.models.adapt_spec import AdaptSpec, ModuleSelector
from lorafast.models.module_names import canonical_name, unwrap
from lorafast.models.target_modules import is_conv1d, select_names
from lorafast.nn.adapter_layer import AdapterLayer


class TargetWeight(NamedTuple):
    """The weight of one targeted linear.

    name is the first canonical name of the module. transposed is True for transformers' Conv1D,
    whose weight is [K, N]. has_adapter is True for a layer of lorafast.
    """

    name: str
    weight: nn.Parameter
    transposed: bool
    has_adapter: bool

    def as_matrix(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the weight's shape as [N, K], a view of it."""
        return tensor.t() if self.transposed else tensor


def select_weights(
    model: nn.Module, target_modules: ModuleSelector, exclude_modules: ModuleSelector | None
) -> list[TargetWeight]:
    """Return the distinct weights that `lorafast.adapt` would select, in module order.

    Raises:
        NotImplementedError: a weight is sharded.
        TypeError: a selected module is no linear, or its weight is no Parameter.
        ValueError: nothing is selected.
    """
    model = unwrap(model)
    names = select_names(model, AdaptSpec(LoRA(), target_modules, exclude_modules))
    targets: dict[nn.Parameter, TargetWeight] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if name not in names:
            continue
        transposed = is_conv1d(module)
        if not (transposed or isinstance(module, nn.Linear)):
            raise TypeError(
                f"target_modules={target_modules!r} matches {name}, "
                f"a {type(module).__name__} and no linear"
            )
        weight = _check_weight(f"{name}.weight", module.weight)
        has_adapter = isinstance(module, AdapterLayer)
        target = TargetWeight(canonical_name(name), weight, transposed, has_adapter)
        targets.setdefault(weight, target)
    return list(targets.values())


def _check_weight(name: str, weight: object) -> nn.Parameter:
    """Return the weight if it is a Parameter [N, K] that is not sharded, else raise."""
    if not isinstance(weight, nn.Parameter):
        raise TypeError(
            f"{name} is a {type(weight).__name__} and no Parameter: it cannot be trained"
        )
    checks.pair(name, weight, "[N, K]")
    if hasattr(weight, "full_tensor"):
        raise NotImplementedError(f"{name} {tuple(weight.shape)} is a sharded DTensor")
    return weight


def check_not_ddp(model: nn.Module) -> None:
    """Raise ValueError for a model in DistributedDataParallel.

    DDP averages the gradients of a bucket when the whole bucket is there; a hook that frees each
    gradient at once would free it before that.
    """
    if isinstance(model, DistributedDataParallel):
        raise ValueError(
            f"per_layer=True: {type(model).__name__} needs every gradient until all are summed; "
            "use per_layer=False"
        )


def register_gradient_hook(
    optimizer: Optimizer, parameter: nn.Parameter, method: Callable[..., None], *args: object
) -> RemovableHandle:
    """Call method(optimizer, parameter, *args) when backward has the gradient, then free it.

    The hook holds the optimizer weakly: it does nothing once the optimizer is deleted.
    """
    reference = weakref.ref(optimizer)

    @torch.no_grad()
    def hook(parameter: nn.Parameter) -> None:
        owner = reference()
        if owner is not None and parameter.grad is not None:
            method(owner, parameter, *args)
            parameter.grad = None

    return parameter.register_post_accumulate_grad_hook(hook)
