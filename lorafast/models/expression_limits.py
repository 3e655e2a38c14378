"""Limits for regular expressions of an unknown author, which may backtrack forever.

re cannot be stopped from inside the process. An expression whose steps have a small bound needs no
stopping; the others are matched in a subprocess with a time limit.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing import spawn

# The time that the expressions of a file may take together in the subprocess.
TIMEOUT_SECONDS = 10
# The largest bound for which no subprocess is needed: some seconds of re's steps.
_MOST_STEPS = 3e8
# One letter, escaped letter or class, perhaps repeated; or alternatives without a repetition in
# them, perhaps optional. No repetition is inside another one.
_LETTER = r"(?:[\w.\-]|\\[\Wdw]|\[\^?[\w.\-]+\])"
_BOUNDED = re.compile(
    rf"\^?(?:{_LETTER}(?:[*+]\??|\??)|\((?:\?:)?(?:{_LETTER}|\|)*\)\??)*\$?", re.DOTALL
)
_CHILD_PROGRAM = """
import json, re, sys
task = json.load(sys.stdin)
patterns = [re.compile(expression) for expression in task["expressions"]]
if task["full"]:
    matches = [pattern.fullmatch for pattern in patterns]
else:
    matches = [pattern.match for pattern in patterns]
numbers = [next((i for i, match in enumerate(matches) if match(name)), None)
           for name in task["names"]]
json.dump(numbers, sys.stdout)
"""


def are_bounded(expressions: Sequence[str], names: Sequence[str], ends: bool) -> bool:
    """True if re matches all names with all expressions in a few seconds, whatever they are.

    ends: the end of a name after a dot is matched too.
    """
    longest = max(map(len, names), default=0)
    steps = sum(_most_steps(expression, longest, ends) for expression in expressions)
    return steps * len(names) <= _MOST_STEPS


def _most_steps(expression: str, length: int, ends: bool) -> float:
    """Return a bound of the ways in which re can try an expression on a name of some length."""
    if not _BOUNDED.fullmatch(expression):
        return math.inf
    bare = re.sub(r"\\.", "x", expression, flags=re.DOTALL)
    # Each repetition takes a part of the name; so does the beginning, where an end is matched.
    repetitions = len(re.findall(r"[*+]", bare)) + ends
    options = len(re.findall(r"(?<![*+(])\?", bare))
    alternatives = [group.count("|") + 1 for group in re.findall(r"\(([^()]*)\)", bare)]
    return math.comb(length + repetitions, repetitions) * 2.0**options * math.prod(alternatives)


def match_in_subprocess(
    expressions: Sequence[str], names: Sequence[str], full: bool
) -> list[int | None]:
    """Return, for each name, the number of the first expression that matches it, or None.

    Raises:
        ValueError: no interpreter can be started, or it failed or took longer than
            TIMEOUT_SECONDS.
    """
    shown = str(list(expressions))[:200]
    task = json.dumps({"expressions": list(expressions), "names": list(names), "full": full})
    command = [_interpreter(shown), "-I", "-S", "-c", _CHILD_PROGRAM]
    try:
        process = subprocess.run(
            command, input=task, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=True
        )
    except (subprocess.SubprocessError, OSError) as error:
        raise ValueError(
            f"{shown}: expressions of a file that could not be matched in {TIMEOUT_SECONDS} s "
            f"({type(error).__name__})"
        ) from error
    return json.loads(process.stdout)


def _interpreter(shown: str) -> str:
    """Return a Python that can be started.

    In an embedded interpreter sys.executable is None or the program around it. Such a program tells
    multiprocessing which Python to start.
    """
    for executable in (spawn.get_executable(), sys.executable):
        path = os.fsdecode(executable or "")
        if re.match(r"\.?(python|pypy)", os.path.basename(path), re.IGNORECASE):
            return path
    raise ValueError(
        f"{shown}: these expressions of a file may take forever, so another process has to match "
        f"them; sys.executable={sys.executable!r} is no Python that could be started: call "
        "multiprocessing.set_executable with one"
    )
