"""The folders outside the package (kernels, csrc, bench), which tracked symlinks bring into it."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).parent.parent
# Folder at the top of the repository -> its symlink inside the package.
LINKS = {"kernels": "engine/kernels", "csrc": "engine/csrc", "bench": "bench"}


def why_missing(folder: str, package: Path = PACKAGE) -> str | None:
    """Return None if the symlink leads to a folder, else what is wrong and how to repair it."""
    link = LINKS[folder]
    path = package / link
    if path.is_dir():
        return None
    if path.is_file():
        target = "../" * (link.count("/") + 1) + folder
        return (
            f"lorafast/{link} is a text file, not a link to {target}: this checkout was made "
            "without symlinks; repair it with "
            f"`git config core.symlinks true && git checkout -- lorafast/{link}`"
        )
    return f"lorafast/{link} is missing: this copy of lorafast is incomplete; install it again"
