"""lorafast.estimate_gradients: the gradients of a model's weights, for a start that follows them (LoRA-GA, arXiv 2407.05000)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from lorafast.engine import checks
from lorafast.engine.problem import accumulator
from lorafast.methods.lora import LoRA
from lorafast.models.adapt import refuse_parallel
from lorafast.models.adapt_spec import ALL_LINEAR, Names, Plan
from lorafast.models.module_names import clean, some
from lorafast.models.target_modules import owners, places, storage

Totals = dict[nn.Parameter, torch.Tensor]


def estimate_gradients(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: Callable[[nn.Module, Any], torch.Tensor],
    target_modules: Names = ALL_LINEAR,
    *,
    exclude_modules: Names | None = None,
    training: bool = False,
) -> dict[str, torch.Tensor]:
    """G = dL/dW, the mean over the batches, of every weight that target_modules and exclude_modules name, as in adapt.

        gradients = lorafast.estimate_gradients(model, batches, lambda model, batch: model(**batch).loss)
        lorafast.adapt(model, lorafast.LoRA(r=8, rslora=True, init=lorafast.LoRAGA(gradients)))

    model: a plain one, not adapted yet. loss_fn gives a scalar; what else the call needs (autocast, devices) is its business.
    Returns {layer name: G [N,K]} on the CPU, fp32 (fp64 for fp64); 0 where no loss depends on a weight. On the model's device one
    gradient lives at a time: each is added up on the CPU and dropped as soon as backward has it whole.
    training=False runs the model in eval mode, since dropout would be noise in the estimate; True is for what works in train mode
    alone, as transformers' gradient checkpointing. Afterwards, errors included, everything is as it was: flags, gradients, modes,
    buffers, and torch's generators, so that a run draws the same numbers with an estimate before it and without.
    ValueError or TypeError where adapt raises one, for tied weights, no batch, and a loss or gradient that is of no use.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    refuse_parallel(model)
    found = places(model, Plan(LoRA(), target_modules, exclude_modules=exclude_modules))
    layers = {module: clean(names[0]) for module, names in found.items()}
    _refuse(model, layers)
    totals: Totals = {}
    count = 0
    with _lent(model, {module.weight for module in layers}, totals, training), torch.enable_grad():
        for batch in batches:
            loss = loss_fn(model, batch)
            _refuse_loss(loss, target_modules)
            loss.backward()
            count += 1
    if not count:
        raise ValueError("batches is empty: a gradient needs one at least")
    gradients = {name: _mean(module, totals, count) for module, name in layers.items()}
    if wrong := [name for name, G in gradients.items() if not G.isfinite().all()]:
        raise ValueError(
            f"the gradient of {some(wrong)} is not finite: scale the loss down, or run loss_fn in a wider dtype"
        )
    return gradients


def _refuse(model: nn.Module, layers: dict[nn.Module, str]) -> None:
    held = owners(model)
    for module, name in layers.items():
        weight = module.weight
        checks.floating(f"{name}.weight", weight)
        shown = f"{name}.weight {tuple(weight.shape)}"
        if weight.is_meta:
            raise ValueError(f"{shown} is on the meta device: load it first")
        if hasattr(weight, "full_tensor"):
            raise NotImplementedError(
                f"{shown} is a sharded DTensor: estimate gradients before sharding it"
            )
        if len(sharing := held[storage(weight)]) > 1:
            raise ValueError(
                f"{' and '.join(sharing.values())} are one tensor, with one gradient for both: leave {name} out"
            )
        if weight._post_accumulate_grad_hooks or weight._backward_hooks:
            raise ValueError(
                f"{shown} has hooks that would take the estimate for a training step (an optimizer in backward?)"
            )


def _refuse_loss(loss: object, target_modules: Names) -> None:
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        what = (
            f"a tensor {tuple(loss.shape)}"
            if isinstance(loss, torch.Tensor)
            else f"a {type(loss).__name__}"
        )
        raise ValueError(f"loss_fn(model, batch) must give a scalar tensor, not {what}")
    if not loss.requires_grad:
        raise ValueError(
            f"loss_fn(model, batch) gave a loss that depends on no weight of target_modules={target_modules!r}: "
            "detached, in torch.no_grad(), or behind reentrant checkpointing?"
        )


@contextlib.contextmanager
def _lent(
    model: nn.Module, weights: set[nn.Parameter], totals: Totals, training: bool
) -> Iterator[None]:
    """Inside, these weights alone ask for gradients, which go into totals; whatever happens, the model is given back as it was."""

    def add(weight: nn.Parameter) -> None:
        grad, weight.grad = weight.grad.detach(), None
        grad = grad.to_dense() if grad.is_sparse else grad
        if weight in totals:
            totals[weight].add_(grad.to("cpu"))
        else:
            totals[weight] = grad.to("cpu", accumulator(grad.dtype))

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
            hooks += [weight.register_post_accumulate_grad_hook(add) for weight in weights]
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


def _mean(module: nn.Module, totals: Totals, count: int) -> torch.Tensor:
    """[N,K], contiguous. Taken out of totals, so that a transposed copy is the only second one."""
    weight = module.weight
    total = totals.pop(weight, None)
    if total is None:
        total = torch.zeros(weight.shape, dtype=accumulator(weight.dtype), device="cpu")
    total.div_(count)
    return total if isinstance(module, nn.Linear) else total.t().contiguous()
