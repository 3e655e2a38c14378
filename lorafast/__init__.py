"""Adapter layers (LoRA, DoRA, LaMDA and their family) at the cost of the frozen layer."""

import contextlib
import importlib
import importlib.util
import sys
from types import ModuleType
from typing import TYPE_CHECKING

from lorafast.integrations import peft_registry
from lorafast.models import experts_registry
from lorafast.runtime import import_hooks, moved_modules, name_hints

if TYPE_CHECKING:
    from lorafast import optim as optim
    from lorafast import reference as reference
    from lorafast import schedule as schedule
    from lorafast.checkpoint.keys import adapter_state_dict
    from lorafast.checkpoint.save_load import load_adapter, save_adapter
    from lorafast.functional import grouped_linear, linear
    from lorafast.integrations.accelerate import accelerate, patch_peft, restore
    from lorafast.integrations.adapter_update import adapter_update
    from lorafast.integrations.merged import merged
    from lorafast.methods.adalora import AdaLoRA
    from lorafast.methods.aflora import AFLoRA
    from lorafast.methods.dora import DoRA
    from lorafast.methods.lamda import LaMDA
    from lorafast.methods.lora import LoRA
    from lorafast.methods.lora_ga import LoRAGA
    from lorafast.methods.pissa import PiSSA
    from lorafast.methods.vera import VeRA
    from lorafast.models.adapt import adapt
    from lorafast.models.disable import disable_adapter
    from lorafast.models.explain import explain
    from lorafast.models.fused_mlp import ungroup
    from lorafast.models.gradient_check import adapters_without_gradient
    from lorafast.models.gradients import estimate_gradients
    from lorafast.models.merge import merge, merge_and_unload, unload
    from lorafast.models.merge_quantised import merge_quantised
    from lorafast.models.quantize_base import quantize_base
    from lorafast.models.ranks import spectral_ranks
    from lorafast.models.reference_model import reference_model
    from lorafast.models.start import start_adapters
    from lorafast.models.summary import adapter_parameters, trainable_summary
    from lorafast.nn.embedding import Embedding
    from lorafast.nn.experts import Experts
    from lorafast.nn.linear import Linear
    from lorafast.registry import list_methods
    from lorafast.runtime.fallback import FallbackWarning

__version__ = "0.1.0"

__all__ = [
    "AFLoRA", "AdaLoRA", "DoRA", "Embedding", "Experts", "FallbackWarning", "LaMDA", "Linear",
    "LoRA", "LoRAGA", "PiSSA", "VeRA", "accelerate", "adapt", "adapter_parameters",
    "adapter_state_dict", "adapter_update", "adapters_without_gradient", "disable_adapter",
    "estimate_gradients", "explain", "grouped_linear", "linear", "list_methods", "load_adapter",
    "merge", "merge_and_unload", "merge_quantised", "merged", "patch_peft", "quantize_base",
    "reference_model", "restore", "save_adapter", "spectral_ranks", "start_adapters",
    "trainable_summary", "ungroup", "unload",
]  # fmt: skip

# The module below lorafast that defines each name. Importing torch takes seconds, which a command
# line that only prints its help need not spend, so the names are imported when one is first used.
_DEFINED_IN = {
    "checkpoint.keys": ("adapter_state_dict",),
    "checkpoint.save_load": ("load_adapter", "save_adapter"),
    "functional": ("grouped_linear", "linear"),
    "integrations.accelerate": ("accelerate", "patch_peft", "restore"),
    "integrations.adapter_update": ("adapter_update",),
    "integrations.merged": ("merged",),
    "methods.adalora": ("AdaLoRA",),
    "methods.aflora": ("AFLoRA",),
    "methods.dora": ("DoRA",),
    "methods.lamda": ("LaMDA",),
    "methods.lora": ("LoRA",),
    "methods.lora_ga": ("LoRAGA",),
    "methods.pissa": ("PiSSA",),
    "methods.vera": ("VeRA",),
    "models.adapt": ("adapt",),
    "models.disable": ("disable_adapter",),
    "models.explain": ("explain",),
    "models.fused_mlp": ("ungroup",),
    "models.gradient_check": ("adapters_without_gradient",),
    "models.gradients": ("estimate_gradients",),
    "models.merge": ("merge", "merge_and_unload", "unload"),
    "models.merge_quantised": ("merge_quantised",),
    "models.quantize_base": ("quantize_base",),
    "models.ranks": ("spectral_ranks",),
    "models.reference_model": ("reference_model",),
    "models.start": ("start_adapters",),
    "models.summary": ("adapter_parameters", "trainable_summary"),
    "nn.embedding": ("Embedding",),
    "nn.experts": ("Experts",),
    "nn.linear": ("Linear",),
    "registry": ("list_methods",),
    "runtime.fallback": ("FallbackWarning",),
}
_PUBLIC_MODULES = ("optim", "reference", "schedule")

moved_modules.install()
peft_registry.install()
experts_registry.install()


def _import_all() -> None:
    """Import every public name, and with them the operators of torch.ops.lorafast."""
    for module in _PUBLIC_MODULES:
        importlib.import_module(f"lorafast.{module}")
    for module, names in _DEFINED_IN.items():
        defined = importlib.import_module(f"lorafast.{module}")
        globals().update({name: getattr(defined, name) for name in names})


def __getattr__(name: str) -> object:
    if name in __all__:
        _import_all()
        return globals()[name]
    if name.isidentifier() and importlib.util.find_spec(f"lorafast.{name}"):
        return importlib.import_module(f"lorafast.{name}")
    raise AttributeError(
        f"module 'lorafast' has no attribute {name!r}{name_hints.name_hint(name, __all__)}"
    )


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PUBLIC_MODULES})


def _import_all_after(torch: ModuleType) -> None:
    """Import every public name once torch is imported later, as import lorafast does after it.

    Operators are looked up at torch.ops.lorafast, without a name of this package.
    """
    own = [module for name, module in sys.modules.items() if name.startswith("lorafast.")]
    specs = (getattr(module, "__spec__", None) for module in own)
    # A module of lorafast that is importing torch would be found half executed.
    if any(getattr(spec, "_initializing", False) for spec in specs):
        return
    # import torch does not fail for lorafast: the first use of a name raises the error again.
    with contextlib.suppress(Exception):
        _import_all()


# Where torch is imported already, nothing is left to save.
if "torch" in sys.modules:
    _import_all()
else:
    import_hooks.after_import("torch", _import_all_after)
