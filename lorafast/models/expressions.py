"""Regular expressions over module names. Those of a file are matched in a subprocess with a limit.

An expression of an unknown author may backtrack forever, and re cannot be stopped from inside the
process.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from typing import Any

# The time that the expressions of a file may take together.
TIMEOUT_SECONDS = 10
# Letters, digits and dots: no repetition and no group, so matching takes linear time.
_PLAIN = re.compile(r"[\w.\-]*")
_CHILD_PROGRAM = """
import json, re, sys
task = json.load(sys.stdin)
match = re.fullmatch if task["full"] else re.match
indices = [
    next((i for i, expression in enumerate(task["expressions"]) if match(expression, name)), None)
    for name in task["names"]
]
json.dump(indices, sys.stdout)
"""


def check_expression(argument: str, expression: object, template: str = "%s") -> None:
    """Raise ValueError naming the argument if the expression, put into template, does not compile.

    Args:
        argument: name of the argument, for the message.
        expression: what the caller passed.
        template: the format string that the expression is put into before it is used.
    """
    try:
        pattern: Any = template % expression if isinstance(expression, str) else expression
        re.compile(pattern)
    except (re.error, TypeError, RecursionError, OverflowError) as error:
        raise ValueError(
            f"{argument}={str(expression)[:200]!r} is no regular expression: {error}"
        ) from error


def first_matches(
    expressions: Sequence[str], names: Iterable[str], untrusted: bool, full: bool
) -> dict[str, int]:
    """Return, for each name that some expression matches, the index of the first that does.

    Args:
        expressions: regular expressions, in order of preference.
        names: names to match; those that nothing matches are left out of the result.
        untrusted: the expressions come from a file and are matched in a subprocess.
        full: an expression must match the whole name, not only its beginning.

    Raises:
        ValueError: untrusted expressions failed or took longer than TIMEOUT_SECONDS.
    """
    names = list(names)
    if untrusted:
        indices = _match_in_subprocess(expressions, names, full)
    else:
        match = re.fullmatch if full else re.match
        indices = [
            next((i for i, expression in enumerate(expressions) if match(expression, name)), None)
            for name in names
        ]
    return {name: index for name, index in zip(names, indices, strict=True) if index is not None}


def _match_in_subprocess(
    expressions: Sequence[str], names: list[str], full: bool
) -> list[int | None]:
    task = json.dumps({"expressions": list(expressions), "names": names, "full": full})
    command = [sys.executable, "-I", "-S", "-c", _CHILD_PROGRAM]
    try:
        process = subprocess.run(
            command, input=task, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=True
        )
    except (subprocess.SubprocessError, OSError) as error:
        raise ValueError(
            f"{str(list(expressions))[:200]}: expressions of a file that could not be matched in "
            f"{TIMEOUT_SECONDS} s ({type(error).__name__})"
        ) from error
    return json.loads(process.stdout)


def is_plain(expression: str) -> bool:
    """True if the expression consists of letters, digits, "_", "-" and dots alone."""
    return _PLAIN.fullmatch(expression) is not None


def plain_matches_end(expression: str, name: str) -> bool:
    """True if a plain expression matches the name or its end after a dot.

    A dot in the expression stands for any character, as in a regular expression.
    """
    start = len(name) - len(expression)
    if start < 0 or (start > 0 and name[start - 1] != "."):
        return False
    return all(e in (".", c) for e, c in zip(expression, name[start:], strict=True))
