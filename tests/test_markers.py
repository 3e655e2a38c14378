"""Tests that need PEFT, compile or start processes have the marker, or make quick would grow."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
FILES = sorted(TESTS.rglob("test_*.py"))
# What in the source of a test, or of a function of its file that it calls, asks for a marker.
ASKS = {"compile": r"torch\.compile\(", "distributed": r"\bspawn\("}


def markers(node):
    """The markers that stand above a definition."""
    text = " ".join(ast.unparse(decorator) for decorator in node.decorator_list)
    return set(re.findall(r"pytest\.mark\.(\w+)", text))


def module_markers(tree):
    """The markers of a whole module, by its pytestmark."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark":
            return set(re.findall(r"pytest\.mark\.(\w+)", ast.unparse(node.value)))
    return set()


def asking(functions, pattern):
    """The names of the functions whose source, or that of those they call, matches."""
    sources = {name: "\n".join(map(ast.unparse, node.body)) for name, node in functions.items()}
    found = {name for name, source in sources.items() if re.search(pattern, source)}
    while more := {
        name
        for name, source in sources.items()
        if name not in found and any(re.search(rf"\b{other}\b", source) for other in found)
    }:
        found |= more
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(TESTS)))
def test_markers_are_there(path):
    if path == Path(__file__):
        return
    tree = ast.parse(path.read_text())
    marked = module_markers(tree)
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    for marker, pattern in ASKS.items():
        for name in asking(functions, pattern):
            assert not name.startswith("test_") or marker in marked | markers(functions[name]), name
    imported = {
        alias.name if isinstance(node, ast.Import) else node.module
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    needs_peft = {name for name in imported if name.split(".")[0] == "peft"} | (
        imported & {"helpers.peft_models"}
    )
    assert not needs_peft or "peft" in marked
