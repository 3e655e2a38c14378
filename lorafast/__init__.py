"""Adapter layers (LoRA, DoRA, LaMDA and their family) at the cost of the frozen layer."""

from lorafast import optim as optim
from lorafast import reference as reference
from lorafast import schedule as schedule
from lorafast.checkpoint.keys import adapter_state_dict
from lorafast.checkpoint.save_load import load_adapter, save_adapter
from lorafast.functional import linear
from lorafast.integrations.accelerate import accelerate, patch_peft, restore
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
from lorafast.models.gradients import estimate_gradients
from lorafast.models.merge import merge, merge_and_unload, unload
from lorafast.models.ranks import spectral_ranks
from lorafast.models.summary import adapter_parameters, trainable_summary
from lorafast.nn.embedding import Embedding
from lorafast.nn.linear import Linear
from lorafast.registry import list_methods
from lorafast.runtime import moved_modules

__version__ = "0.1.0"

__all__ = [
    "AFLoRA", "AdaLoRA", "DoRA", "Embedding", "LaMDA", "Linear", "LoRA", "LoRAGA", "PiSSA",
    "VeRA", "accelerate", "adapt", "adapter_parameters", "adapter_state_dict",
    "disable_adapter", "estimate_gradients", "explain", "linear", "list_methods",
    "load_adapter", "merge", "merge_and_unload", "patch_peft", "restore", "save_adapter",
    "spectral_ranks", "trainable_summary", "unload",
]  # fmt: skip

moved_modules.install()


def __getattr__(name: str) -> object:
    return moved_modules.attribute(__name__, name)
