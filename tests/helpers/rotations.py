"""Grids of tests in which minor axes rotate: every value occurs, not every combination."""

from collections.abc import Iterable, Iterator, Sequence

import pytest

# Neighbours differ in one of the two, opposites in both; any three in a row have every value.
DROPOUT_AND_BIAS = ((0.0, False), (0.3, False), (0.3, True), (0.0, True))


def rotating(rows: Iterable, minor: Sequence, count: int = 1, step: int = 1) -> Iterator[tuple]:
    """Pairs (row, value): `count` values of `minor`, `step` apart, the first one further each row.

    Over as many rows as `minor` has values, every value occurs `count` times.
    """
    for first, row in enumerate(rows):
        for i in range(count):
            yield row, minor[(first + i * step) % len(minor)]


def thinned(cases: Iterable[tuple], kept: int = 2) -> list:
    """Parameters of which one in `kept` is quick, and the others are slow.

    kept should share no factor with how often an axis of the cases turns.
    """
    return [
        pytest.param(*case, marks=[pytest.mark.slow] * (i % kept > 0))
        for i, case in enumerate(cases)
    ]
