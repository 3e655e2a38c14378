"""The console script lorafast-bench. It names the package to install if an import fails."""

from __future__ import annotations

import sys

from lorafast.bench import options
from lorafast.runtime import extras


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status, as commands.run does."""
    words = sys.argv[1:] if arguments is None else arguments
    # Before torch is imported, which takes seconds: help and typos are answered at once.
    asked = options.parse(words)
    try:
        from lorafast.bench import commands

        return commands.run(asked, words)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "lorafast":
            raise
        hint = extras.how_to_install("bench")
        print(f"lorafast-bench needs {error.name}: {hint}", file=sys.stderr)
        return 2
