"""Functions on whole models: adapt, explain, disable_adapter, merge, unload and others."""

from lorafast.runtime import moved_modules


def __getattr__(name: str) -> object:
    return moved_modules.attribute(__name__, name)
