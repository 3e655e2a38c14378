"""lorafast.start_adapters: start adapters whose weights have left the meta device by themselves."""

from __future__ import annotations

from torch import nn

from lorafast.models.adapt import share_tensors
from lorafast.models.module_names import adapter_layers


def start_adapters(model: nn.Module) -> nn.Module:
    """Start the adapters that still wait for their weights, in place, and return the model.

    A model that is adapted on the meta device starts its adapters when load_state_dict brings the
    weights. Some loaders put them in one by one instead (accelerate's load_checkpoint_in_model with
    a device_map): then call this before the model is dispatched or gets an optimizer, which needs
    the started Parameters. model.to(...) starts them too, but each layer gets projections of its
    own where layers share them (VeRA).

    Args:
        model: a model that lorafast.adapt adapted. Adapters that have started stay as they are.

    Returns:
        The same model object.

    Raises:
        ValueError: the model has no adapted layer, or an adapter cannot start from its weight.

    Example:
        import torch, lorafast

        with torch.device("meta"):
            model = lorafast.adapt(torch.nn.Sequential(torch.nn.Linear(8, 8)), lorafast.LoRA(r=2))
        model[0].weight = torch.nn.Parameter(torch.randn(8, 8), requires_grad=False)
        model[0].bias = torch.nn.Parameter(torch.zeros(8), requires_grad=False)
        lorafast.start_adapters(model)
        assert not model[0].lora_A.is_meta
    """
    waiting = [layer for layer in adapter_layers(model).values() if layer.awaits_start()]
    for layer in waiting:
        layer.reset_adapter()
    share_tensors(waiting)
    return model
