"""A labelled text corpus that every Python carries: the docstrings of its standard library."""

from __future__ import annotations

import ast
import functools
import hashlib
import sysconfig
from pathlib import Path
from typing import NamedTuple

from lorafast.bench.errors import BenchError

# Modules of every Python from 3.11 on, each with about forty docstrings or more, and none of them
# an optional part of a distribution.
LABELS = (
    *("asyncio", "calendar", "collections", "concurrent", "configparser", "difflib", "doctest"),
    *("email", "ftplib", "http", "imaplib", "inspect", "ipaddress", "logging", "mailbox"),
    *("multiprocessing", "pathlib", "smtplib", "ssl", "statistics", "tarfile", "threading"),
    *("typing", "unittest", "urllib", "wsgiref", "xml", "zipfile"),
)

SHORTEST = 30  # characters; a shorter docstring says nothing about its module
MAX_PER_LABEL = 120  # docstrings, so that no label outweighs the others


class Example(NamedTuple):
    """A docstring, and the index of its module in LABELS."""

    text: str
    label: int


class Corpus(NamedTuple):
    """The training and the held-out examples, each in an order that depends on the text alone."""

    train: tuple[Example, ...]
    held_out: tuple[Example, ...]


@functools.cache
def corpus(library: Path | None = None) -> Corpus:
    """Return the corpus of a standard library: by default that of this Python.

    A hash of the text selects the held-out fifth. The split is the same on every machine, and no
    text is on both sides.
    """
    root = Path(sysconfig.get_path("stdlib")) if library is None else library
    train, held_out = [], []
    for label, name in enumerate(LABELS):
        for text in sorted(_docstrings(root, name), key=_hash)[:MAX_PER_LABEL]:
            (held_out if _hash(text) % 5 == 0 else train).append(Example(text, label))
    if not held_out or not train:
        raise BenchError(
            f"no docstrings in {root.name}: this Python carries no sources of its standard library"
        )
    train.sort(key=lambda example: _hash(example.text))
    held_out.sort(key=lambda example: _hash(example.text))
    return Corpus(tuple(train), tuple(held_out))


def _docstrings(root: Path, name: str) -> set[str]:
    """Return every docstring of a module or package as one line, without the module's name."""
    files = [root / f"{name}.py"]
    if not files[0].exists():
        files = sorted((root / name).rglob("*.py"))
    texts = set()
    for file in files:
        if "test" in file.parts or "tests" in file.parts:
            continue
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = " ".join((ast.get_docstring(node) or "").replace(name, "it").split())
                if len(text) >= SHORTEST:
                    texts.add(text)
    return texts


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
