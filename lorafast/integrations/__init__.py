"""PEFT and transformers: accelerate, PEFT's layers on lorafast's ops, LaMDA in PEFT, Trainer.

AccelerateCallback is imported from here too, on first use, because it imports transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorafast.integrations.trainer_accelerate import AccelerateCallback

__all__ = ["AccelerateCallback"]


def __getattr__(name: str) -> object:
    if name in __all__:
        return getattr(importlib.import_module("lorafast.integrations.trainer_accelerate"), name)
    raise AttributeError(f"module 'lorafast.integrations' has no attribute {name!r}")
