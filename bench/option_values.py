"""The values of options: functions from a word to a value, or to an error that says what fits."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

from lorafast.bench.cases.choices import DTYPES
from lorafast.runtime.command_line import with_message
from lorafast.runtime.spelling import unknown

# torch's own names of the dtypes.
_LONG_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def list_of(parse: Callable[[str], object]) -> Callable[[str], tuple]:
    """Return a parser of a comma-separated list without duplicates.

    Where `parse` returns a plain tuple, its elements join the list.
    """

    def parsed(text: str) -> tuple:
        found = []
        for word in text.split(","):
            value = parse(word.strip())
            is_list = isinstance(value, tuple) and not hasattr(value, "_fields")
            found += value if is_list else [value]
        return tuple(dict.fromkeys(found))

    parsed.__name__ = "list"
    return with_message(parsed)


def _number(text: str, kind: type, least: float, what: str) -> float:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not value >= least or value == math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} must be {what}")
    return value


def count(text: str) -> int:
    """Return a whole number of at least 1."""
    return _number(text, int, 1, "a whole number of at least 1")


def width(text: str) -> int:
    """Return a multiple of 64."""
    value = _number(text, int, 64, "a multiple of 64")
    if value % 64:
        raise argparse.ArgumentTypeError(f"{text!r} must be a multiple of 64")
    return value


def whole(text: str) -> int:
    """Return a whole number of at least 0."""
    return _number(text, int, 0, "a whole number of at least 0")


def positive(text: str) -> float:
    """Return a number above 0."""
    value = _number(text, float, 0, "a number above 0")
    if value == 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number above 0")
    return value


def probability(text: str) -> float:
    """Return a number in [0, 1)."""
    value = _number(text, float, 0, "a number in [0, 1)")
    if value >= 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number in [0, 1)")
    return value


@with_message
def dtype(text: str) -> str:
    """Return the short name of a dtype."""
    name = _LONG_DTYPES.get(text, text)
    if name not in DTYPES:
        raise ValueError(unknown(text, DTYPES))
    return name
