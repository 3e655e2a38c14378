"""Regular expressions over names. One out of a file may be made to run forever: it runs in a process of its own, with a limit."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence

# How long a file's expressions may take, in seconds.
LIMIT = 10
# What has no repetition and no group takes no time worth counting.
_PLAIN = re.compile(r"[\w.\-]*")
_CHILD = """
import json, re, sys
asked = json.load(sys.stdin)
match = re.fullmatch if asked["whole"] else re.match
json.dump([next((i for i, e in enumerate(asked["expressions"]) if match(e, n)), None) for n in asked["names"]], sys.stdout)
"""


def compiled(argument: str, expression: object, form: str = "%s") -> None:
    """ValueError naming the argument unless this is a regular expression, also where form puts it."""
    try:
        re.compile(form % expression if isinstance(expression, str) else expression)
    except (re.error, TypeError, RecursionError, OverflowError) as error:
        raise ValueError(
            f"{argument}={str(expression)[:200]!r} is no regular expression: {error}"
        ) from error


def first(
    expressions: Sequence[str], names: Iterable[str], foreign: bool, whole: bool
) -> dict[str, int]:
    """For each name that one matches, whole or from its start, the first that does; others are left out.

    foreign: they come from a file. ValueError if such a one takes too long.
    """
    names = list(names)
    if foreign:
        found = _apart(expressions, names, whole)
    else:
        match = re.fullmatch if whole else re.match
        found = [
            next((i for i, one in enumerate(expressions) if match(one, name)), None)
            for name in names
        ]
    return {name: index for name, index in zip(names, found, strict=True) if index is not None}


def _apart(expressions: Sequence[str], names: list[str], whole: bool) -> list[int | None]:
    asked = json.dumps({"expressions": list(expressions), "names": names, "whole": whole})
    command = [sys.executable, "-I", "-S", "-c", _CHILD]
    try:
        done = subprocess.run(
            command, input=asked, capture_output=True, text=True, timeout=LIMIT, check=True
        )
    except (subprocess.SubprocessError, OSError) as error:
        raise ValueError(
            f"{str(list(expressions))[:200]}: expressions of a file that could not be matched in {LIMIT} s ({type(error).__name__})"
        ) from error
    return json.loads(done.stdout)


def is_plain(expression: str) -> bool:
    """Whether an expression is letters and dots, which need no engine."""
    return _PLAIN.fullmatch(expression) is not None


def plain_ends(expression: str, name: str) -> bool:
    """Whether a plain expression matches the name, or its end after a dot. Its dots stand for any letter."""
    start = len(name) - len(expression)
    if start < 0 or (start > 0 and name[start - 1] != "."):
        return False
    return all(e in (".", c) for e, c in zip(expression, name[start:], strict=True))
