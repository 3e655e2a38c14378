"""A Griffe extension for mkdocstrings: what the API reference makes of a docstring's last sections.

Google style has no section for a single example or for a paper. "Example" becomes a block of
Python, and each paper of "Source" a link.
"""

from __future__ import annotations

import re

import griffe

EXAMPLE = re.compile(r"^Example:\n((?: {4}.*\n?|\n)+)", re.MULTILINE)
SOURCE = re.compile(r"^Source:\n((?: {4}.*\n?)+)", re.MULTILINE)


class DocstringExamples(griffe.Extension):
    """Rewrites the docstring of every object that Griffe loads."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: object) -> None:
        """Rewrite the docstring of one object, if it has one."""
        if obj.docstring is not None:
            obj.docstring.value = marked_up(obj.docstring.value)


def marked_up(docstring: str) -> str:
    """Return the docstring with its example as a block of code and its papers as links."""
    docstring = EXAMPLE.sub(_fenced, docstring)
    return SOURCE.sub(_linked, docstring)


def _fenced(found: re.Match[str]) -> str:
    if "```" in found[1]:
        return found[0]
    return f"Example:\n    ```python\n{found[1].rstrip()}\n    ```\n\n"


def _linked(found: re.Match[str]) -> str:
    papers = re.sub(r"arXiv:(\d{4}\.\d{5})", r"[\g<0>](https://arxiv.org/abs/\1)", found[1])
    return f"Source: {papers.strip()}\n"
