"""The rooms outside the package (kernels, csrc, bench) are reached through tracked symlinks; here is why one is missing."""

from __future__ import annotations

from pathlib import Path

ROOMS = ("kernels", "csrc", "bench")


def why_missing(room: str, package: Path = Path(__file__).parent) -> str | None:
    """None if lorafast/<room> is a folder, else what happened and how to mend it."""
    path = package / room
    if path.is_dir():
        return None
    if path.is_file():
        return (
            f"lorafast/{room} is a text file, not a link to ../{room}: this checkout was made without symlinks; "
            f"mend it with `git config core.symlinks true && git checkout -- lorafast/{room}`"
        )
    return f"lorafast/{room} is missing: this copy of lorafast is incomplete; install it again"
