"""Real text that every Python has: the docstrings of the standard library, labelled by the module they stand in."""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from pathlib import Path
from typing import NamedTuple

from lorafast.bench.refusal import Refused

# In every Python from 3.11 on, each with some forty docstrings or more, and none of them an optional part of a distribution.
LABELS = (
    "asyncio", "calendar", "collections", "concurrent", "configparser", "difflib", "doctest", "email", "ftplib", "http",
    "imaplib", "inspect", "ipaddress", "logging", "mailbox", "multiprocessing", "pathlib", "smtplib", "ssl", "statistics",
    "tarfile", "threading", "typing", "unittest", "urllib", "wsgiref", "xml", "zipfile",
)  # fmt: skip

SHORTEST = 30  # characters: below, a docstring says nothing of its module
MAX_PER_LABEL = 120  # docstrings of one label, so that none outweighs the rest


class Example(NamedTuple):
    """A docstring, and the index of its module in LABELS."""

    text: str
    label: int


class Corpus(NamedTuple):
    """The examples to train on and those held out, in an order that depends on their text alone."""

    train: tuple[Example, ...]
    held_out: tuple[Example, ...]


def corpus(library: Path | None = None) -> Corpus:
    """Split by a hash of the text, one in five held out: the same everywhere, and the same text is never on both sides."""
    root = Path(sysconfig.get_path("stdlib")) if library is None else library
    train, held_out = [], []
    for label, name in enumerate(LABELS):
        for text in sorted(_docstrings(root, name), key=_hash)[:MAX_PER_LABEL]:
            (held_out if _hash(text) % 5 == 0 else train).append(Example(text, label))
    if not held_out or not train:
        raise Refused(
            f"no docstrings in {root.name}: this Python carries no sources of its standard library"
        )
    return Corpus(
        *(
            tuple(sorted(part, key=lambda example: _hash(example.text)))
            for part in (train, held_out)
        )
    )


def _docstrings(root: Path, name: str) -> set[str]:
    """Every docstring of a module or package, in one line, its own name taken out."""
    files = (
        [root / f"{name}.py"]
        if (root / f"{name}.py").exists()
        else sorted((root / name).rglob("*.py"))
    )
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
