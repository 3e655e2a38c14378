"""lorafast.estimate_gradients: the gradients of a model's weights, for LoRA-GA's init.

LoRA-GA (arXiv:2407.05000) starts A and B from singular vectors of the gradient of each weight.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from lorafast.engine import checks
from lorafast.engine.precision import accumulator
from lorafast.methods.lora import LoRA
from lorafast.models.adapt import refuse_parallel
from lorafast.models.adapt_spec import AdaptSpec, ModuleSelector
from lorafast.models.module_names import canonical_name, format_names, require_module
from lorafast.models.target_modules import find_targets, parameter_owners
from lorafast.quantised import formats
from lorafast.runtime.torch_internals import has_gradient_hooks, storage_key

# Sums of gradients on the CPU, as the weights are laid out.
GradientSums = dict[nn.Parameter, torch.Tensor]


def estimate_gradients(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: Callable[[nn.Module, Any], torch.Tensor],
    target_modules: str | Collection[str] = "all-linear",
    *,
    exclude_modules: str | Collection[str] | None = None,
    training: bool = False,
) -> dict[str, torch.Tensor]:
    """Return dL/dW of every targeted weight, averaged over batches, for lorafast.LoRAGA.

    On the model's device one gradient exists at a time: backward adds each to a sum on the CPU as
    soon as it is complete. Afterwards, also after an error, everything is as before: requires_grad,
    gradients, training modes, buffers and the states of torch's random generators.

    Args:
        model: a model that is not adapted yet.
        batches: what loss_fn takes, one batch an item.
        loss_fn: returns a scalar tensor for (model, batch). Autocast and moving the batch to a
            device belong in it.
        target_modules: as in lorafast.adapt.
        exclude_modules: as in lorafast.adapt.
        training: run the model in train mode; for what works in train mode only, such as
            transformers' gradient checkpointing. In eval mode dropout does not disturb the
            estimate.

    Returns:
        {layer name: G [N,K]} on the CPU, in fp32 (fp64 for an fp64 weight); 0 where the loss does
        not depend on a weight.

    Raises:
        ValueError: as lorafast.adapt; a targeted weight is tied or has hooks, batches is empty, the
            loss is no scalar or depends on no targeted weight, or a gradient is not finite.
        TypeError: as lorafast.adapt.
        NotImplementedError: a targeted weight is a sharded DTensor.

    Example:
        import torch, lorafast

        model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        batches = [torch.randn(4, 8) for _ in range(2)]
        gradients = lorafast.estimate_gradients(
            model, batches, lambda model, batch: model(batch).square().mean()
        )
        lorafast.adapt(model, lorafast.LoRA(r=2, init=lorafast.LoRAGA(gradients)))

    Source:
        arXiv:2407.05000
    """
    require_module(model)
    refuse_parallel(model)
    spec = AdaptSpec(LoRA(), target_modules, exclude_modules=exclude_modules)
    layers = {
        module: canonical_name(names[0]) for module, names in find_targets(model, spec).items()
    }
    _check_weights(model, layers)
    sums: GradientSums = {}
    count = 0
    weights: set[Any] = {module.weight for module in layers}
    with _summing_gradients(model, weights, sums, training), torch.enable_grad():
        for batch in batches:
            loss = loss_fn(model, batch)
            _check_loss(loss, target_modules)
            loss.backward()
            count += 1
    if not count:
        raise ValueError("batches is empty: a gradient needs one at least")
    gradients = {name: _mean(module, sums, count) for module, name in layers.items()}
    if wrong := [name for name, G in gradients.items() if not G.isfinite().all()]:
        raise ValueError(
            f"the gradient of {format_names(wrong)} is not finite: scale the loss down, or run "
            "loss_fn in a wider dtype"
        )
    return gradients


def _check_weights(model: nn.Module, layers: dict[nn.Module, str]) -> None:
    owners = parameter_owners(model)
    for module, name in layers.items():
        weight: Any = formats.held_weight(module)
        checks.floating(f"{name}.weight", weight)
        shown = f"{name}.weight {tuple(weight.shape)}"
        if weight.is_meta:
            raise ValueError(f"{shown} is on the meta device: load it first")
        if hasattr(weight, "full_tensor"):
            raise NotImplementedError(
                f"{shown} is a sharded DTensor: estimate gradients before sharding it"
            )
        holders = owners[storage_key(weight)]
        if len(holders) > 1:
            raise ValueError(
                f"{' and '.join(holders.values())} are one tensor, with one gradient for both: "
                f"leave {name} out"
            )
        if has_gradient_hooks(weight):
            raise ValueError(
                f"{shown} has hooks that would take the estimate for a training step (an optimizer "
                "in backward?)"
            )


def _check_loss(loss: object, target_modules: ModuleSelector) -> None:
    if not isinstance(loss, torch.Tensor):
        raise ValueError(
            f"loss_fn(model, batch) must give a scalar tensor, not a {type(loss).__name__}"
        )
    if loss.numel() != 1:
        raise ValueError(
            f"loss_fn(model, batch) must give a scalar tensor, not a tensor {tuple(loss.shape)}"
        )
    if not loss.requires_grad:
        raise ValueError(
            "loss_fn(model, batch) gave a loss that depends on no weight of "
            f"target_modules={target_modules!r}: detached, in torch.no_grad(), or behind reentrant "
            "checkpointing?"
        )


@contextlib.contextmanager
def _summing_gradients(
    model: nn.Module, weights: set[nn.Parameter], sums: GradientSums, training: bool
) -> Iterator[None]:
    """A context in which only these weights get gradients, which backward adds to sums.

    On exit the model and torch's generators are restored.
    """

    def add_gradient(weight: nn.Parameter) -> None:
        grad, weight.grad = weight.grad.detach(), None
        grad = grad.to_dense() if grad.is_sparse else grad
        if weight in sums:
            sums[weight].add_(grad.to("cpu"))
        else:
            sums[weight] = grad.to("cpu", accumulator(grad.dtype))

    parameters = [
        (parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()
    ]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    modes = [(module, module.training) for module in model.modules()]
    devices = {parameter.device for parameter, _, _ in parameters if parameter.is_cuda}
    hooks = []
    with torch.random.fork_rng(devices=list(devices)):
        try:
            for parameter, _, _ in parameters:
                parameter.requires_grad_(parameter in weights)
                parameter.grad = None
            model.train(training)
            for weight in weights:
                hooks.append(weight.register_post_accumulate_grad_hook(add_gradient))
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for module, mode in modes:
                module.training = mode
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
            for parameter, flag, grad in parameters:
                parameter.requires_grad_(flag)
                parameter.grad = grad


def _mean(module: nn.Module, sums: GradientSums, count: int) -> torch.Tensor:
    """Return the mean gradient of the module's weight as a contiguous [N,K] tensor.

    The sum is removed from sums, so that a transposed copy is the only second tensor of its size.
    """
    weight: Any = module.weight
    total = sums.pop(weight, None)
    if total is None:
        total = torch.zeros(weight.shape, dtype=accumulator(weight.dtype), device="cpu")
    total.div_(count)
    return total if isinstance(module, nn.Linear) else total.t().contiguous()
