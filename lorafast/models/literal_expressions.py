"""Regular expressions of fixed letters, which are looked up by a name instead of tried one by one.

A model of thousands of layers may come with a pattern for each.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from lorafast.models.module_names import endings

# Letters, digits, "_", "-", dots, and other characters behind a backslash; perhaps anchored.
_FORM = re.compile(r"(\^?)((?:[\w.\-]|\\\W)*)(\$?)", re.DOTALL)
_LETTER = re.compile(r"\\?(.)", re.DOTALL)

# Length of what is matched -> positions of the dots, which match any letter -> the expression with
# these dots and without backslashes -> the numbers of the expressions that read so.
_Table = dict[int, dict[tuple[int, ...], dict[str, list[int]]]]


class LiteralExpressions:
    """The expressions of fixed letters of a list, each known by its number there.

    Args:
        ends: an expression matches the end of a name after a dot too, not only the whole name.
    """

    def __init__(self, ends: bool) -> None:
        self._ends = ends
        self._of_whole_names: _Table = {}
        self._of_ends: _Table = {}

    def add(self, expression: str, number: int) -> bool:
        """Add an expression. False if it is neither of fixed letters nor "|" between such."""
        forms = [_FORM.fullmatch(part) for part in expression.split("|")]
        if None in forms:
            return False
        for anchor, text, _ in (form.groups() for form in forms):
            letters = [(found[1], len(found[0]) == 1) for found in _LETTER.finditer(text)]
            dots = tuple(i for i, (letter, bare) in enumerate(letters) if bare and letter == ".")
            table = self._of_ends if self._ends and not anchor else self._of_whole_names
            key = "".join(letter for letter, _ in letters)
            table.setdefault(len(key), {}).setdefault(dots, {}).setdefault(key, []).append(number)
        return True

    def matches(self, name: str) -> list[int]:
        """Return the numbers of all expressions that match a name, in no order."""
        found = _look_up(self._of_whole_names, [name])
        return found + _look_up(self._of_ends, endings(name))


def _look_up(table: _Table, texts: Iterable[str]) -> list[int]:
    found: list[int] = []
    for text in texts:
        for dots, numbers in table.get(len(text), {}).items():
            letters = list(text)
            for i in dots:
                letters[i] = "."
            found += numbers.get("".join(letters), ())
    return found
