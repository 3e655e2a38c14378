"""Tables as plain text and as HTML, for objects that print in a terminal and in a notebook."""

from __future__ import annotations

import html
from collections.abc import Collection, Iterable, Sequence

Line = Sequence[str]


def text_table(header: Line, lines: Iterable[Line], right: Collection[str] = ()) -> list[str]:
    """Return the lines of a table in plain text, the header first.

    Args:
        header: the titles of the columns.
        lines: the cells of every line, one for each column.
        right: the titles of columns that are aligned to the right.
    """
    rows = [header, *lines]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = [str.rjust if title in right else str.ljust for title in header]
    return [
        "  ".join(
            side(cell, width) for side, cell, width in zip(sides, row, widths, strict=True)
        ).rstrip()
        for row in rows
    ]


def html_table(header: Line, lines: Iterable[Line], right: Collection[str] = ()) -> str:
    """Return a table in HTML; arguments as in text_table. Every cell is escaped."""
    sides = ["right" if title in right else "left" for title in header]

    def row(tag: str, cells: Line) -> str:
        filled = (
            f'<{tag} style="text-align: {side}">{html.escape(cell)}</{tag}>'
            for side, cell in zip(sides, cells, strict=True)
        )
        return f"<tr>{''.join(filled)}</tr>"

    body = "\n".join(row("td", line) for line in lines)
    return f"<table>\n<thead>{row('th', header)}</thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def html_list(items: Iterable[str]) -> str:
    """Return a list in HTML, or nothing if there are no items. Every item is escaped."""
    lines = "\n".join(f"<li>{html.escape(item)}</li>" for item in items)
    return f"<ul>\n{lines}\n</ul>" if lines else ""
