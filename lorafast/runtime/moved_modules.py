"""The old dotted paths that pickles and imports may name, and the modules they stand for now."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

# Old path below lorafast -> new path below lorafast. They stay for one release.
MOVED = {
    "adapted": "nn.adapter_layer",
    "catalog": "registry",
    "embedding": "nn.embedding",
    "layer": "nn.linear",
    "merging": "nn.merge_mixin",
    "methods.start": "methods.weight_init",
    "models.accelerate": "integrations.accelerate",
    "models.checkpoint": "checkpoint.save_load",
    "models.lamda": "integrations.peft_lamda",
    "models.peft": "integrations.peft_linear",
    "models.trainer": "integrations.trainer",
    "models.variant": "integrations.peft_lamda_variant",
    "problem": "engine.problem",
}
# Old name of a class -> new name, where both changed.
RENAMED = {
    "adapted": {"Adapted": "AdapterLayer"},
    "layer": {"Product": "AdapterLinearBase"},
    "merging": {"Folded": "DeltaFactors", "Merged": "MergeState", "Merging": "MergeMixin"},
    "methods.start": {"Start": "WeightInit"},
    "problem": {"Tensors": "LayerTensors", "Settings": "CallOptions"},
}


class MovedModule(ModuleType):
    """An old path: every attribute is the new module's, under its old name."""

    def __getattr__(self, name: str) -> object:
        old = self.__name__.removeprefix("lorafast.")
        new = importlib.import_module(f"lorafast.{MOVED[old]}")
        return getattr(new, RENAMED.get(old, {}).get(name, name))


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, old = fullname.partition(".")
        if package != "lorafast" or old not in MOVED:
            return None
        return importlib.machinery.ModuleSpec(fullname, self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return MovedModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        importlib.import_module(f"lorafast.{MOVED[module.__name__.removeprefix('lorafast.')]}")


def attribute(package: str, name: str) -> ModuleType:
    """Return the module `name` of a package, for its __getattr__: lorafast.layer and others.

    AttributeError if there is none, of today or of old.
    """
    full = f"{package}.{name}"
    if name.startswith("_") or importlib.util.find_spec(full) is None:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return importlib.import_module(full)


def install() -> None:
    """Let imports find the old paths, after everything that really exists."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
