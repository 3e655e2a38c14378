"""lorafast.adapters_without_gradient: the adapters that a backward pass did not reach."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lorafast.models.module_names import canonical_name, unwrap

# How the names of an adapter's tensors begin, in lorafast's layers and in PEFT's.
_PREFIX = "lora_"


def adapters_without_gradient(model: nn.Module) -> list[str]:
    """Return the names of the layers whose adapter trains and has a tensor without a gradient.

    Call it between backward() and zero_grad(). A layer is named where nothing calls it: a fused
    loss reads the weight of `lm_head` itself, Mamba the weight of `dt_proj`, and fused attention
    those of q, k and v. There the adapter has no effect and never trains. Layers that only some
    inputs pass, such as experts, are named if none passed them.

    Args:
        model: a model that lorafast.adapt or PEFT adapted; wrappers are looked through.

    Returns:
        The names, in the order of the model's modules.

    Raises:
        TypeError: model is no module.

    Example:
        import torch, lorafast

        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))
        lorafast.adapt(model, lorafast.LoRA(r=2))
        torch.nn.functional.linear(model[0](torch.randn(2, 8)), model[1].weight).sum().backward()
        assert lorafast.adapters_without_gradient(model) == ["1"]
    """
    return list(
        dict.fromkeys(name for name, parameter in _trained(model) if parameter.grad is None)
    )


def unreached_adapters(model: nn.Module) -> tuple[str, ...]:
    """Return what adapters_without_gradient does, or nothing if no adapter has a gradient.

    Before the first backward pass and after zero_grad() none has, which says nothing of a layer.
    """
    if all(parameter.grad is None for _, parameter in _trained(model)):
        return ()
    return tuple(adapters_without_gradient(model))


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield each tensor of an adapter that trains, with the name of its layer."""
    for name, parameter in unwrap(model).named_parameters():
        parts = canonical_name(name).split(".")
        ours = [i for i, part in enumerate(parts) if part.startswith(_PREFIX)]
        if ours and parameter.requires_grad:
            yield ".".join(parts[: ours[0]]), parameter
