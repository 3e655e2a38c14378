"""Why a module cannot be replaced by an adapted layer, and what to do instead."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lorafast.quantised import formats
from lorafast.runtime.torch_internals import CALL_HOOKS, is_foreign_subclass

# Packages whose layers hold quantised weights.
_QUANTISERS = (
    "aqlm", "auto_gptq", "awq", "bitsandbytes", "compressed_tensors", "eetq", "gptqmodel", "hqq",
    "optimum", "quanto", "torchao",
)  # fmt: skip
# Names of Parameters and buffers in which layers of other packages hold quantised weights.
_QUANTISED_TENSORS = ("qweight", "weight_packed", "Wq", "W_q")
# Part of the names of torch's own modules with quantised layers, such as torch.ao.nn.quantized.
_TORCH_QUANTISED = "quantized"
# How the names of classes end, of transformers and mamba_ssm, that read the weights of these
# children and do not call them. A Mamba's may call dt_proj where it is quantised, which is refused.
_READ_BY_PARENT = {
    "LayoutLMv2Encoder": ("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"),
    "LongcatFlashTopkRouter": ("classifier",),
    "MHAttentionMap": ("k_linear", "k_proj"),
    "Mamba": ("dt_proj",),
    "MambaMixer": ("dt_proj",),
    "MobileBertLMPredictionHead": ("decoder", "dense"),
    "NeoMMEForMaskedLM": ("unembedding_projection",),
    "TDNNLayer": ("kernel",),
    "WavLMAttention": ("k_proj", "out_proj", "q_proj", "v_proj"),
}
_LEAVE_TO_PEFT = (
    "or give the model PEFT's adapters and call lorafast.accelerate(model), which leaves such "
    "layers to PEFT and runs the others"
)


def why_not_replaceable(
    model: nn.Module, name: str, module: nn.Module, why_not_plain: str | None
) -> str | None:
    """Return why the named module cannot be replaced by an adapted layer, or None if it can.

    why_not_plain: why the class of adapted layer does not take the module, or None.
    """
    if is_quantised(module) and formats.of(module) is None:
        kind = f"is a {type(module).__module__}.{type(module).__qualname__} with a quantised weight"
        if _is_quantised_by_torch(module):
            return (
                f"{kind}: adapt the model before it is quantised, and quantise it after "
                "lorafast.merge_and_unload(model)"
            )
        return (
            f"{kind}: load the model unquantised (lorafast adapts fp64, fp32, bf16, fp16 and "
            f"the formats of docs/quantised.md), {_LEAVE_TO_PEFT}"
        )
    return why_not_plain or _why_state_is_lost(module) or _why_skipped_in_eval(model, name)


def is_quantised(module: nn.Module) -> bool:
    """True if the module's weight is quantised by one of the packages that do so."""
    weight: Any = getattr(module, "weight", None)
    return _is_quantised_class(module) or (
        isinstance(weight, torch.Tensor) and _is_quantised_tensor(weight)
    )


def is_quantised_linear(module: nn.Module) -> bool:
    """True for what a quantiser puts in the place of an nn.Linear, whatever class it is."""
    return hasattr(module, "in_features") and _is_quantised_class(module)


def _is_quantised_class(module: nn.Module) -> bool:
    return (
        any(base.__module__.partition(".")[0] in _QUANTISERS for base in type(module).__mro__)
        or any(hasattr(module, tensor) for tensor in _QUANTISED_TENSORS)
        or _is_quantised_by_torch(module)
    )


def _is_quantised_by_torch(module: nn.Module) -> bool:
    modules = (base.__module__.split(".") for base in type(module).__mro__)
    return any(parts[0] == "torch" and _TORCH_QUANTISED in parts for parts in modules)


def _is_quantised_tensor(weight: torch.Tensor) -> bool:
    narrow = weight.dtype.is_floating_point and weight.dtype.itemsize == 1
    return is_foreign_subclass(weight) or narrow or weight.dtype in (torch.int8, torch.uint8)


def _why_state_is_lost(module: nn.Module) -> str | None:
    """Return what a replacement would lose: a patched forward, hooks, other tensors. None if none.

    Hooks of the call move to the replacement. Other hooks are found by the names of nn.Module's
    attributes, all of which end in "_hooks".
    """
    attributes = vars(module)
    if "_hf_hook" in attributes:
        # PEFT makes its factors on the meta device too where the weight is there.
        otherwise = "" if formats.held_weight(module).is_meta else f"; {_LEAVE_TO_PEFT}"
        return (
            "is placed or offloaded by accelerate (device_map): adapt the model while all weights "
            "are in memory (loaded without device_map, or after accelerate.hooks."
            f"remove_hook_from_submodules(model)), and dispatch or offload it afterwards{otherwise}"
        )
    if _has_patched_forward(module):
        return (
            "has a patched forward that its replacement would lose: undo the patch, adapt, and "
            f"patch again; {_LEAVE_TO_PEFT}"
        )
    if is_quantised(module):
        # It stays whole, in the layer that replaces it.
        return None
    hooks = [key for key, value in attributes.items() if key.endswith("_hooks") and value]
    if others := [key.strip("_") for key in hooks if key not in CALL_HOOKS]:
        return (
            f"has {', '.join(others)} that its replacement would lose: remove them, adapt, and "
            "register them again"
        )
    if hooks and hasattr(module.weight, "full_tensor"):
        return "has hooks and is sharded: adapt the model before sharding it"
    tensors = [*module.named_parameters(), *module.named_buffers()]
    if others := [name for name, _ in tensors if name not in ("weight", "bias")]:
        return (
            f"holds {', '.join(others)} besides weight and bias, which its replacement would lose"
        )
    return None


def _has_patched_forward(module: nn.Module) -> bool:
    """True if the instance has a forward that is not its class's.

    accelerate leaves the class's own there when it removes its hooks.
    """
    forward = vars(module).get("forward")
    own = (getattr(forward, "__func__", None), getattr(forward, "__self__", None))
    return forward is not None and own != (type(module).forward, module)


def is_read_by_parent(model: nn.Module, name: str) -> bool:
    """True if the named module's parent reads its weight and never calls it.

    An adapter on such a module has no effect.
    """
    if isinstance(model.get_submodule(name), NonDynamicallyQuantizableLinear):
        # torch's class for the out_proj of nn.MultiheadAttention alone.
        return True
    parent, _, child = name.rpartition(".")
    return any(
        child in children and base.__name__.endswith(ending)
        for base in type(model.get_submodule(parent)).__mro__
        for ending, children in _READ_BY_PARENT.items()
    )


def why_not_called(model: nn.Module, name: str) -> str | None:
    """Return why an adapter on the named module has no effect, or None if it has one."""
    if not is_read_by_parent(model, name):
        return None
    parent = type(model.get_submodule(name.rpartition(".")[0])).__name__
    return (
        f"{parent} does not call, but reads its weight: an adapter there would have no effect, so "
        "leave it out"
    )


def _why_skipped_in_eval(model: nn.Module, name: str) -> str | None:
    """Return why the parent at times reads the module's weight without calling it, or None."""
    parent, _, child = name.rpartition(".")
    is_encoder = isinstance(model.get_submodule(parent), nn.TransformerEncoderLayer)
    if is_encoder and child in ("linear1", "linear2"):
        return "nn.TransformerEncoderLayer does not call in eval, but reads its weight"
    return None
