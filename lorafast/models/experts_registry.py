"""lorafast's entry in transformers' registry of experts' implementations.

It is added when lorafast is imported, or, if transformers imports its registry later, then. Imports
neither transformers nor torch.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from lorafast.runtime.import_hooks import after_import

NAME = "lorafast"  # as lorafast.nn.expert_parameter, which imports torch, has it


def install() -> None:
    """Add the entry to transformers' registry, now or when that is imported."""
    after_import("transformers.integrations.moe", _register)


def _register(moe: ModuleType) -> None:
    registry = getattr(moe, "ALL_EXPERTS_FUNCTIONS", None)
    if registry is not None and NAME not in registry:
        registry.register(NAME, _forward)


def _forward(*args: Any, **kwargs: Any) -> Any:
    from lorafast.models import experts_forward

    return experts_forward.forward(*args, **kwargs)
