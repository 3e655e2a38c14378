"""Functions that are told when a model gets adapters, and when it is plain again.

The modules that give an adapted transformers model methods of its own register here: adapt and
merge cannot import those that import them.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

# Called with the model that adapt, load_adapter, merge or unload has changed.
Observer = Callable[[nn.Module], None]

on_adapted: list[Observer] = []
on_plain: list[Observer] = []
