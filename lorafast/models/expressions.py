"""Regular expressions over module names: whether they compile, and what they match."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lorafast.models import expression_limits
from lorafast.models.literal_expressions import LiteralExpressions

# PEFT matches a rank or alpha pattern against a whole name or its end after a dot.
_NAME_END = r"(.*\.)?(%s)$"
_PLAIN = re.compile(r"[\w.\-]*")


def check_expression(argument: str, expression: object, ends: bool = False) -> None:
    """Raise ValueError naming the argument if the expression does not compile.

    Args:
        argument: name of the argument, for the message.
        expression: what the caller passed.
        ends: it is to match the end of a name after a dot too.
    """
    template = _NAME_END if ends else "%s"
    try:
        pattern: Any = template % expression if isinstance(expression, str) else expression
        re.compile(pattern)
    except (re.error, TypeError, RecursionError, OverflowError) as error:
        raise ValueError(
            f"{argument}={str(expression)[:200]!r} is no regular expression: {error}"
        ) from error


def first_matches(
    expressions: Sequence[str], names: Iterable[str], untrusted: bool = False, ends: bool = False
) -> dict[str, int]:
    """Return, for each name that some expression matches, the index of the first that does.

    Args:
        expressions: regular expressions, in order of preference.
        names: names to match; those that nothing matches are left out of the result.
        untrusted: the expressions come from a file. Those that may take long are matched in a
            subprocess.
        ends: an expression matches the end of a name after a dot too, not only the whole name.

    Raises:
        ValueError: untrusted expressions could not be matched, or took too long.
    """
    names = list(names)
    literal, others = _split(expressions, ends)
    first = {name: min(literal.matches(name), default=None) for name in names}
    if others:
        for name, index in zip(names, _match(others, names, untrusted, ends), strict=True):
            if index is not None and (first[name] is None or index < first[name]):
                first[name] = index
    return {name: index for name, index in first.items() if index is not None}


def first_unused(expressions: Sequence[str], names: Iterable[str]) -> str | None:
    """Return the first expression that matches neither a name nor its end after a dot, or None."""
    names = list(names)
    literal, others = _split(expressions, ends=True)
    used = {index for name in names for index in literal.matches(name)}
    for index, expression in others.items():
        if any(map(_matcher(expression, ends=True), names)):
            used.add(index)
    return next((e for index, e in enumerate(expressions) if index not in used), None)


def is_plain(expression: str) -> bool:
    """True if the expression consists of letters, digits, "_", "-" and dots alone."""
    return _PLAIN.fullmatch(expression) is not None


def _split(expressions: Sequence[str], ends: bool) -> tuple[LiteralExpressions, dict[int, str]]:
    """Return the expressions of fixed letters, and the others by their index."""
    literal, others = LiteralExpressions(ends), {}
    for index, expression in enumerate(expressions):
        if not literal.add(expression, index):
            others[index] = expression
    return literal, others


def _match(
    expressions: dict[int, str], names: list[str], untrusted: bool, ends: bool
) -> list[int | None]:
    """Return, for each name, the index of the first expression that matches it, or None."""
    indices, texts = list(expressions), list(expressions.values())
    if untrusted and not expression_limits.are_bounded(texts, names, ends):
        templates = [_NAME_END % text if ends else text for text in texts]
        numbers = expression_limits.match_in_subprocess(templates, names, full=not ends)
        return [None if number is None else indices[number] for number in numbers]
    matchers = [(index, _matcher(text, ends)) for index, text in expressions.items()]
    return [next((index for index, match in matchers if match(name)), None) for name in names]


def _matcher(expression: str, ends: bool) -> Callable[[str], re.Match[str] | None]:
    """Return the compiled expression's function of a name. re itself keeps only some of them."""
    return re.compile(_NAME_END % expression).match if ends else re.compile(expression).fullmatch
