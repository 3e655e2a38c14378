"""Fixtures of the tests of the host path: which calls it served, and how to keep it out."""

import pytest
from helpers import host_path

from lorafast.engine import host


@pytest.fixture
def served(monkeypatch):
    """A list with an entry for every call of the host path: True if it served."""
    calls, linear = [], host_path.ready()

    def counted(*args):
        y = linear(*args)
        calls.append(y is not None)
        return y

    monkeypatch.setattr(host, "linear", counted)
    return calls


@pytest.fixture
def by_python(monkeypatch):
    """A function that keeps all later calls in Python, on the op."""
    from lorafast.engine import plain_products

    def turn():
        monkeypatch.setattr(host, "linear", host._declined)
        monkeypatch.setattr(plain_products, "MOST_ELEMENTS", -1)
        monkeypatch.setattr(plain_products, "MOST_ELEMENTS_COPIED", -1)

    return turn
