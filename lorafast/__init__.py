"""lorafast: adapter layers (LoRA, DoRA, LaMDA) at the frozen layer's cost."""

from lorafast.functional import linear

__all__ = ["linear"]
