"""lorafast's entries in PEFT's table of config classes, which PEFT asks about the files it loads.

With them PeftModel.from_pretrained reads the files of a LamdaConfig, and names what reads the
others. They are added when lorafast is imported, or, if PEFT is imported later, then. Imports
neither PEFT nor torch.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NoReturn


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
ENTRIES = {"LAMDA": LamdaEntry, "LORAFAST_DORA_IN": DoraInEntry, "LORAFAST_AFLORA": AfloraEntry}


def install() -> None:
    """Add the entries to PEFT's table, now or when PEFT is imported."""
    if "peft" in sys.modules:
        _register(sys.modules["peft"])
    elif not any(isinstance(finder, _PeftFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PeftFinder())


def _register(peft: ModuleType | None) -> None:
    table = getattr(peft, "PEFT_TYPE_TO_CONFIG_MAPPING", None)
    if table is not None:
        for peft_type, entry in ENTRIES.items():
            table.setdefault(peft_type, entry)


def _lamda_config() -> Any:
    return importlib.import_module("lorafast.integrations.peft_lamda").LamdaConfig


class _PeftFinder(importlib.abc.MetaPathFinder):
    """Finds PEFT as all other finders do, and adds the entries once it has been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "peft":
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        loader: Any = spec.loader if spec is not None else None
        if loader is None:
            return spec
        execute = loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            del loader.exec_module
            execute(module)
            _register(module)

        # On this loader alone, which stays the one that others know.
        loader.exec_module = execute_and_register
        return spec
