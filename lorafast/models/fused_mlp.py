"""adapt(..., fuse_mlp=True) and lorafast.ungroup: gated MLPs that keep less for backward."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from lorafast.models.module_names import require_module
from lorafast.nn.gated_mlp import GatedMLP, gated_class, parts_of, why_not_activation


def fuse_mlps(model: nn.Module) -> list[str]:
    """Let every gated MLP of the model compute its product again in backward; return their names.

    Warns, with the reasons, if the model has none.
    """
    fused: list[str] = []
    reasons: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, GatedMLP):
            continue
        why = why_not(module)
        if why is None:
            kind: Any = type(module)
            module.__class__ = gated_class(kind)
            fused.append(name)
        elif why:
            reasons.append(f"{name or type(module).__name__}: {why}")
    if not fused:
        words = "; ".join(reasons[:3]) or "no module computes down(act(gate(x)) * up(x))"
        warnings.warn(f"fuse_mlp: no gated MLP was found: {words}", stacklevel=3)
    return fused


def why_not(module: nn.Module) -> str | None:
    """Return None for a gated MLP that can be fused, "" for another module, else the reason."""
    parts = parts_of(type(module))
    if parts is None:
        return ""
    if "forward" in vars(module):
        return "has a patched forward (offloading)"
    others = [name for name in parts[:-1] if name not in module._modules]
    if others:
        return f"its {', '.join(others)} is no module"
    return why_not_activation(module.get_submodule(parts.act)) or None


def ungroup(model: nn.Module) -> int:
    """Undo fuse_mlp=True of adapt or accelerate, in place, and return how many MLPs changed.

    Args:
        model: any module.

    Returns:
        The number of gated MLPs that have their own class again.

    Raises:
        TypeError: model is no module.

    Example:
        import lorafast
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaMLP

        model = LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=48))
        lorafast.adapt(model, lorafast.LoRA(r=2), fuse_mlp=True)
        assert lorafast.ungroup(model) == 1
    """
    require_module(model)
    fused: list[Any] = [module for module in model.modules() if isinstance(module, GatedMLP)]
    for module in fused:
        module.__class__ = module._plain_class
    return len(fused)
