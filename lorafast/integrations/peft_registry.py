"""lorafast's entries in PEFT's table of config classes, which PEFT asks about the files it loads.

With them PeftModel.from_pretrained reads the files of a LamdaConfig, and names what reads the
others. They are added when lorafast is imported, or, if PEFT is imported later, then. Imports
neither PEFT nor torch.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any, NoReturn

from lorafast.runtime.import_hooks import after_import


class LamdaEntry:
    """Stands for LamdaConfig, which is imported when a file needs it."""

    def __new__(cls, **fields: Any) -> Any:
        return _lamda_config().from_peft_type(**fields)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Return the LamdaConfig of a folder."""
        return _lamda_config().from_pretrained(*args, **kwargs)


class _UnreadableEntry:
    """Stands for a method of lorafast that PEFT has no layers for: it cannot be read."""

    method: str

    def __new__(cls, **fields: Any) -> NoReturn:
        raise ValueError(
            f"the adapter is a {cls.method} of lorafast, which PEFT has no layers for: "
            "lorafast.load_adapter(model, folder) reads it"
        )

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise ValueError."""
        cls()


class DoraInEntry(_UnreadableEntry):
    """Stands for DoRA(axis='in')."""

    method = "DoRA(axis='in')"


class AfloraEntry(_UnreadableEntry):
    """Stands for AFLoRA."""

    method = "AFLoRA"


# By peft_type, as lorafast.models.peft_config writes them.
ENTRIES = {
    "LAMDA_NEEDS_IMPORT_LORAFAST": LamdaEntry,
    "LAMDA": LamdaEntry,
    "LORAFAST_DORA_IN": DoraInEntry,
    "LORAFAST_AFLORA": AfloraEntry,
}


def install() -> None:
    """Add the entries to PEFT's table, now or when PEFT is imported."""
    after_import("peft", _register)


def _register(peft: ModuleType) -> None:
    table = getattr(peft, "PEFT_TYPE_TO_CONFIG_MAPPING", None)
    if table is not None:
        for peft_type, entry in ENTRIES.items():
            table.setdefault(peft_type, entry)


def _lamda_config() -> Any:
    return importlib.import_module("lorafast.integrations.peft_lamda").LamdaConfig
