"""Messages about words that are not known. Imports no torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def unknown(text: str, known: Iterable[str], more: str = "") -> str:
    """Return the message about a word that is none of the known ones; it names the nearest one.

    more: what else is accepted, as the end of the list.
    """
    known = tuple(known)
    return f"{text!r} is none of {', '.join(known)}{more}{did_you_mean(text, known)}"


def did_you_mean(text: str, known: Iterable[str]) -> str:
    """Return "; did you mean WORD?" for the nearest known word, or "" if none is near."""
    near = difflib.get_close_matches(text, tuple(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""
