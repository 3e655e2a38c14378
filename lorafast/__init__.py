"""lorafast: adapter layers (LoRA, DoRA, LaMDA) at the frozen layer's cost."""

from lorafast import schedule as schedule
from lorafast._version import VERSION
from lorafast.functional import linear
from lorafast.layer import Linear
from lorafast.methods.catalog import list_methods
from lorafast.methods.dora import DoRA
from lorafast.methods.lamda import LaMDA
from lorafast.methods.lora import LoRA
from lorafast.models.accelerate import accelerate, patch_peft, restore
from lorafast.models.adapt import adapt
from lorafast.models.explain import explain

__version__ = VERSION

__all__ = [
    "DoRA", "LaMDA", "Linear", "LoRA", "accelerate", "adapt", "explain", "linear", "list_methods", "patch_peft", "restore",
]  # fmt: skip
