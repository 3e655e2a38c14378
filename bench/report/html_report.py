"""The HTML page: figures, tables and the machine they were measured on, in one file."""

from __future__ import annotations

from html import escape

from lorafast.bench.report import plots
from lorafast.bench.report.record import Results
from lorafast.bench.report.tables import WORDS, Table, legend, tables

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2937; background: #fff; }
body { max-width: 1180px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2.4rem; }
p.lead { color: #4b5563; margin-top: 0; }
figure { margin: 1.5rem 0; } figure svg { max-width: 100%; height: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
th, td { padding: .25rem .7rem; text-align: right; white-space: nowrap; }
th { border-bottom: 2px solid #9ca3af; font-weight: 600; }
tr.end td { border-bottom: 1px solid #d1d5db; }
td.word, th.word { text-align: left; } td.bad { color: #b91c1c; font-weight: 600; }
tr.busy td { color: #9ca3af; }
tr.ours td { background: #fdf2f4; } p.note { color: #4b5563; font-size: 13px; margin: .2rem 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1.2rem; font-size: 13px; }
dt { color: #6b7280; } dd { margin: 0; }
"""


def page(results: list[Results]) -> str:
    """Return the page of one or more files."""
    parts = [f"<h1>lorafast-bench</h1><p class=lead>{escape(_lead(results))}</p>"]
    for figure in plots.figures(results).values():
        parts.append(f"<figure>{plots.svg(figure)}</figure>")
    parts.append("<h2>How to read the tables</h2>" + _notes(legend(results)))
    parts += [_table(table) for table in tables(results)]
    for one in results:
        facts = "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in _facts(one))
        parts.append(f"<h2>Measured on</h2><dl>{facts}</dl>")
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head += f"<title>lorafast-bench</title><style>{_STYLE}</style>"
    body = "\n".join(parts)
    return f"<!doctype html>\n<html lang=en><head>{head}</head><body>\n{body}\n</body></html>\n"


def _lead(results: list[Results]) -> str:
    """Return the devices and torch versions of the files."""
    lines = [f"{one.env.get('device_name')}, torch {one.env.get('torch')}" for one in results]
    return "; ".join(dict.fromkeys(lines))


def _facts(results: Results) -> list[tuple[str, object]]:
    """Return the facts of the environment; each run of a compact file is a fact of its own."""
    facts = [(str(key), value) for key, value in results.env.items() if key != "runs"]
    for name, run in results.env.get("runs", {}).items():
        facts.append((f"run {name}", f"{run.get('commit')}: {run.get('command')}"))
    return facts


def _notes(lines: tuple[str, ...]) -> str:
    return "".join(f"<p class=note>{escape(line)}</p>" for line in lines)


def _table(table: Table) -> str:
    heads = "".join(
        f"<th{' class=word' if head in WORDS else ''}>{escape(head)}</th>" for head in table.heads
    )
    impl, rows = table.heads.index("impl"), []
    for index, row in enumerate(table.rows):
        kind = ["end"] * (index in table.sections) + ["ours"] * row[impl].startswith("lorafast")
        kind += ["busy"] * (index in table.busy)
        cells = "".join(map(_cell, table.heads, row))
        rows.append(f'<tr class="{" ".join(kind)}">{cells}</tr>')
    body = f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    title = escape(table.title)
    return f"<h2>{title}</h2><div class=wide>{body}</div>{_notes(table.notes)}"


def _cell(head: str, cell: str) -> str:
    kind = "word" if head in WORDS else "bad" if cell in ("wrong", "oom") else ""
    return f"<td{f' class={kind}' if kind else ''}>{escape(cell)}</td>"
