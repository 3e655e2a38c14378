"""lorafast.accelerate: a model that carries PEFT's LoRA runs on lorafast's ops, in place; restore and patch_peft beside it."""

from __future__ import annotations

import collections
import contextlib
import importlib.util
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from lorafast.engine import checks


@dataclass(frozen=True)
class Report:
    """What accelerate() found.

    taken: names of the layers whose calls lorafast's ops serve (while neither merged nor disabled). left: names of those that stay
    on PEFT's forward, each with the reason.
    """

    taken: tuple[str, ...]
    left: dict[str, str]

    def __str__(self) -> str:
        total = len(self.taken) + len(self.left)
        reasons = collections.Counter(self.left.values()).most_common()
        return "\n".join(
            [f"{len(self.taken)} of {total} PEFT layers run on lorafast"]
            + [f"left {n}: {why}" for why, n in reasons]
        )


def accelerate(model: nn.Module, dropout_on: str | None = None, keep: str = "inner") -> Report:
    """Put every PEFT lora.Linear of the model on lorafast's ops, in place, by changing its class; restore() undoes it.

    model: a PeftModel, a model with injected adapters (transformers' add_adapter), or either inside DDP or torch.compile.
    Parameters, names, state dict, config, hooks and every method but forward stay PEFT's; each call looks whether the ops can
    serve it, and is PEFT's own where they cannot. Adapters a PeftModel gets later are covered; after a transformers model's
    add_adapter() on new modules call accelerate again. dropout_on=None is PEFT's reading of DoRA's dropout, "both"; "adapter"
    spares its second base GEMM.
    keep: what DoRA keeps for its magnitude, as in lorafast.DoRA.
    Warns once if layers are left. Raises TypeError or ValueError, and changes nothing, if no layer can be taken.
    """
    dropout_on = "both" if dropout_on is None else dropout_on
    checks.words("out", dropout_on, keep, 0.0)
    report = _look(model, dropout_on, keep)
    if not report.taken:
        found = (
            "; ".join(str(report).splitlines()[1:])
            or f"{type(model).__name__} carries no PEFT layer"
        )
        raise ValueError(f"model: nothing to accelerate: {found}")
    _ours().take(model, dropout_on, keep)
    if report.left:
        warnings.warn(f"accelerate: {'; '.join(str(report).splitlines())}", stacklevel=2)
    return report


def restore(model: nn.Module) -> int:
    """Undo accelerate(), or patch_peft(): every layer is PEFT's own class again. How many were ours.

    A layer with an adapter of a LamdaConfig stays ours, because PEFT has no class for it.
    RuntimeError, and nothing is undone, if a layer's class has been changed since (fully_shard does).
    """
    _refuse_what_is_no_module(model)
    return _ours().give_back(model)


@contextlib.contextmanager
def patch_peft() -> Iterator[None]:
    """Inside, PEFT builds its lora.Linear layers as ours: get_peft_model, from_pretrained, and trainers that call them.

        with lorafast.patch_peft():
            trainer = SFTTrainer(..., peft_config=config)

    Quantised and other layers are PEFT's as ever. What was built stays ours afterwards; restore() undoes it, and accelerate() makes
    later adapters on other modules ours too. Keep the block short: inside it models PEFT built before cannot be pickled.
    """
    ours = _ours()
    from peft.tuners.lora import layer

    before = layer.Linear
    layer.Linear = ours.Linear
    try:
        yield
    finally:
        layer.Linear = before


def _look(model: nn.Module, dropout_on: str, keep: str) -> Report:
    _refuse_what_is_no_module(model)
    ours = _ours()
    from peft.tuners.tuners_utils import BaseTunerLayer

    taken, left = [], {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            if why := ours.why_not_take(module, dropout_on, keep):
                left[name] = why
            else:
                taken.append(name)
    return Report(tuple(taken), left)


def _refuse_what_is_no_module(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module with PEFT adapters, not {type(model).__name__}"
        )


def _ours():
    """lorafast.integrations.peft_linear, which needs PEFT: asked for only where PEFT is meant."""
    if importlib.util.find_spec("peft") is None:
        raise ImportError("this needs peft: pip install 'lorafast[peft]'")
    from lorafast.integrations import peft_linear

    return peft_linear
