"""The console script lorafast-bench. It names the package to install if an import fails."""

from __future__ import annotations

import sys


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status, as commands.main does."""
    try:
        from lorafast.bench import commands

        return commands.main(sys.argv[1:] if arguments is None else arguments)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "lorafast":
            raise
        print(f"lorafast-bench needs {error.name}: pip install 'lorafast[bench]'", file=sys.stderr)
        return 2
