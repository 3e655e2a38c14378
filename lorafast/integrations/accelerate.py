"""lorafast.accelerate: run a model with PEFT's LoRA layers on lorafast's ops, in place.

restore undoes it; patch_peft lets PEFT build its layers so from the start.
"""

from __future__ import annotations

import collections
import contextlib
import importlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import nn

from lorafast.engine import checks
from lorafast.models import fused_mlp


@dataclass(frozen=True)
class Report:
    """What lorafast.accelerate did; str() gives a summary.

    Attributes:
        taken: names of the layers whose calls run on lorafast's ops, as long as they are neither
            merged nor disabled.
        left: names of the layers that stay on PEFT's forward, each with the reason. On a GPU that
            may be a model's, for a training step of 2048 tokens; each call then asks it anew.
    """

    taken: tuple[str, ...]
    left: dict[str, str]

    def __str__(self) -> str:
        total = len(self.taken) + len(self.left)
        reasons = collections.Counter(self.left.values()).most_common()
        lines = [f"{len(self.taken)} of {total} PEFT layers run on lorafast"]
        return "\n".join(lines + [f"left {n}: {why}" for why, n in reasons])


def accelerate(
    model: nn.Module,
    dropout_on: str | None = None,
    keep: str = "inner",
    fuse_mlp: bool = False,
) -> Report:
    """Run every PEFT lora.Linear of the model on lorafast's ops, in place, by changing its class.

    It does the same with PEFT's layers on weights that bitsandbytes or torchao quantised, and with
    its wrappers of experts' Parameters (target_parameters, docs/experts.md).

    Parameters, names, the state dict, the config, hooks and every method except forward stay
    PEFT's. Each call checks whether the ops can serve it, and otherwise runs PEFT's own forward.
    Adapters that a PeftModel gets later are covered; after add_adapter of a transformers model on
    new modules, call accelerate again. Warns once if some layers, or all, stay on PEFT's forward.
    On a GPU a layer stays there, too, where a model (docs/modelled-steps.md) expects that to take
    less time; a GPU whose kernels have not been tried is tried first.

    Args:
        model: a PeftModel, a model with injected adapters (add_adapter of transformers), or either
            inside DDP or torch.compile.
        dropout_on: DoRA's dropout, as in lorafast.DoRA. None is PEFT's reading, "both"; "adapter"
            saves its second base product.
        keep: what DoRA saves for its magnitude, as in lorafast.DoRA.
        fuse_mlp: True lets gated MLPs compute the input of down again in backward, as in
            lorafast.adapt. lorafast.ungroup undoes it, and so does restore.

    Returns:
        A Report with the fields taken and left; print it for a summary. taken is empty if no layer
        can run on the ops; the model computes what it did before.

    Raises:
        ValueError: the model has no PEFT adapter, or an option is wrong. Nothing has changed.
        TypeError: model is no module.
        ImportError: PEFT is not installed.

    Example:
        import peft, torch, lorafast

        model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"]))
        print(lorafast.accelerate(model))  # 1 of 1 PEFT layers run on lorafast
        model(torch.randn(4, 8)).sum().backward()
    """
    dropout_on = "both" if dropout_on is None else dropout_on
    checks.words("out", dropout_on, keep, 0.0)
    report = inspect(model, dropout_on, keep)
    _peft_linear().convert(model, dropout_on, keep)
    if report.left or not report.taken:
        warnings.warn(f"accelerate: {'; '.join(str(report).splitlines())}", stacklevel=2)
    if fuse_mlp:
        fused_mlp.fuse_mlps(model)
    return report


def restore(model: nn.Module) -> int:
    """Undo accelerate or patch_peft: give every layer PEFT's own class back, and return how many.

    Layers with an adapter of a LamdaConfig stay, because PEFT has no class for them.

    Args:
        model: as for accelerate.

    Returns:
        The number of layers that changed.

    Raises:
        RuntimeError: another library (fully_shard, for example) has changed a layer's class since.
            Nothing has changed.
        TypeError: model is no module.
        ImportError: PEFT is not installed.

    Example:
        import peft, torch, lorafast

        model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"]))
        lorafast.accelerate(model)
        assert lorafast.restore(model) == 1
    """
    _require_module(model)
    restored = _peft_linear().restore(model)
    fused_mlp.ungroup(model)
    return restored


@contextlib.contextmanager
def patch_peft() -> Iterator[None]:
    """Return a context in which PEFT builds its lora.Linear layers on lorafast's ops.

    It reaches get_peft_model, PeftModel.from_pretrained, and trainers that call them with a
    peft_config. Layers on quantised weights stay PEFT's until accelerate(), others always. What was
    built stays on lorafast's ops afterwards; restore() undoes it, and accelerate() also covers
    adapters that are added to other modules later. Keep the block short: inside it, models that
    PEFT built before cannot be pickled.

    Returns:
        A context manager that yields None.

    Raises:
        ImportError: PEFT is not installed.

    Example:
        import peft, torch, lorafast

        model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        with lorafast.patch_peft():
            model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"]))
        print(lorafast.explain(model))
    """
    peft_linear = _peft_linear()
    layer: Any = importlib.import_module("peft.tuners.lora.layer")
    classes = {"Linear": peft_linear.Linear}
    if hasattr(layer, "ParamWrapper"):
        classes["ParamWrapper"] = peft_linear.peft_experts.ParamWrapper
    before = {name: getattr(layer, name) for name in classes}
    vars(layer).update(classes)
    try:
        yield
    finally:
        vars(layer).update(before)


def inspect(model: nn.Module, dropout_on: str, keep: str) -> Report:
    """Return the layers that convert would serve, and why not the others.

    ValueError if the model has neither PEFT layers nor a PeftModel (of prompt tuning, for example).
    """
    _require_module(model)
    peft_linear = _peft_linear()
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not carries_adapter(model):
        raise ValueError(
            f"model {type(model).__name__} carries no PEFT adapter: give it one with "
            "peft.get_peft_model, or use lorafast.adapt(model, lorafast.LoRA(...)) instead"
        )
    taken, left = [], {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            if why := peft_linear.why_not_convert(module, dropout_on, keep):
                left[name] = why
            else:
                taken.append(name)
    return Report(tuple(taken), left)


def carries_adapter(model: nn.Module) -> bool:
    """True if the model has layers of PEFT's, or is a PeftModel (of prompt tuning, for example)."""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(module, BaseTunerLayer | PeftModel) for module in model.modules())


def _require_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module with PEFT adapters, not {type(model).__name__}"
        )


def _peft_linear() -> ModuleType:
    """Return lorafast.integrations.peft_linear, imported on first use because it imports PEFT."""
    from lorafast.integrations import peft_linear

    return peft_linear
