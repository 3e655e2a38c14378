"""Functions that are called once another package's module has been imported, now or later."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

Call = Callable[[ModuleType], None]


def after_import(name: str, call: Call) -> None:
    """Call call(module) now if the module has been imported, or right after it is executed.

    Imports nothing itself. The module's finder and loader stay the ones that others know.
    """
    if name in sys.modules:
        call(sys.modules[name])
        return
    _finder.calls.setdefault(name, []).append(call)
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the awaited modules as the finders behind it do, and makes their calls."""

    def __init__(self) -> None:
        self.calls: dict[str, list[Call]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self.calls:
            return None
        # Those behind alone: one in front may ask all others too, without end.
        others = sys.meta_path[sys.meta_path.index(self) + 1 :]
        # As the import system does, pass over finders of the old protocol, which have no find_spec.
        finds = (finder.find_spec for finder in others if hasattr(finder, "find_spec"))
        specs = (find(fullname, path, target) for find in finds)
        spec = next((spec for spec in specs if spec is not None), None)
        loader: Any = spec.loader if spec is not None else None
        if loader is None:
            return spec
        execute = loader.exec_module

        def execute_and_call(module: ModuleType) -> None:
            vars(loader).pop("exec_module", None)
            execute(module)
            for call in self.calls.pop(fullname, ()):
                call(module)

        # On this loader alone, which is made anew for every search.
        loader.exec_module = execute_and_call
        return spec


_finder = _Finder()
