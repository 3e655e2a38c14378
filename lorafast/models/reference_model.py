"""lorafast.reference_model: an adapted model's base model, on the same weights."""

from __future__ import annotations

import copy

import torch
from torch import nn

from lorafast.models import adapt_record, extra_trainables, observers
from lorafast.models.adapt import replace_module
from lorafast.models.adapt_spec import TASK_TYPE_ATTRIBUTE
from lorafast.models.disable import disable_adapter
from lorafast.models.instance_methods import drop_methods_of
from lorafast.models.module_names import adapter_layers, names_by_layer, unwrap


@torch.no_grad()
def reference_model(model: nn.Module) -> nn.Module:
    """Return the base model of an adapted model as a model of its own, on the same weights.

    For trainers that take a frozen reference beside the model that they train, such as the
    `ref_model` of TRL's DPOTrainer, which would otherwise load the base model a second time. The
    result is of the model's class and computes what the model computes inside disable_adapter. It
    shares the memory of all weights, is frozen, in eval, and has none of the trained Parameters:
    training the model does not change it. Merging or unloading the model does.

    Args:
        model: a model that lorafast.adapt adapted, before it is sharded; DDP, DataParallel and
            torch.compile around it are looked through.

    Returns:
        The reference model. Adapted layers are plain modules in it; only those whose init changed
        the weight (LaMDA residual, PiSSA, LoRA-GA) stay adapter layers, which are disabled.

    Raises:
        ValueError: the model has no adapted layer.
        RuntimeError: a layer is merged or disabled, or initial values are not known (the model was
            on the meta device when it was adapted).
        NotImplementedError: a weight is sharded (FSDP2). A reference of a sharded model is a second
            model, or log-probabilities that are computed before the first step.

    Example:
        import torch, lorafast

        policy = lorafast.adapt(torch.nn.Sequential(torch.nn.Linear(8, 8)), lorafast.LoRA(r=2))
        reference = lorafast.reference_model(policy)
        assert reference[0].weight.data_ptr() == policy[0].weight.data_ptr()
    """
    layers = adapter_layers(model, require_enabled=True)
    inner = unwrap(model)
    for name, layer in layers.items():
        if hasattr(layer.weight, "full_tensor"):
            raise NotImplementedError(
                f"{name}.weight {tuple(layer.weight.shape)} is a sharded DTensor, which a second "
                "model cannot share: call reference_model before sharding, or compute the "
                "reference's log-probabilities before the first step (precompute_ref_log_probs)"
            )
    with disable_adapter(inner):
        shared = {id(tensor): tensor for tensor in (*inner.parameters(), *inner.buffers())}
        reference = copy.deepcopy(inner, shared)
    drop_methods_of(inner, reference)
    extra_trainables.stop_training(reference, restore=False)
    vars(reference).pop(TASK_TYPE_ATTRIBUTE, None)
    adapt_record.forget(reference)
    for layer, names in names_by_layer(reference).items():
        if layer._removed_delta is None and layer is not reference:
            replace_module(reference, names, layer.plain())
    observers.tell_plain(reference)
    _freeze(reference)
    return reference.eval()


def _freeze(model: nn.Module) -> None:
    """Put frozen Parameters on the memory of those that train.

    Freezing the latter, which belong to another model too, would stop the training of that.
    """
    frozen: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad:
                own = nn.Parameter(parameter.detach(), requires_grad=False)
                module._parameters[name] = frozen.setdefault(parameter, own)
