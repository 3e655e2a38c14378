"""lorafast-bench: the way in, which says what to install where something is missing."""

from __future__ import annotations

import sys


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit status, as commands.main gives it."""
    try:
        from lorafast.bench import commands

        return commands.main(sys.argv[1:] if arguments is None else arguments)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "lorafast":
            raise
        print(f"lorafast-bench needs {error.name}: pip install 'lorafast[bench]'", file=sys.stderr)
        return 2
