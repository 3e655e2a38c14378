"""README and docs: code blocks run, tables hold the project's facts, and links resolve."""

import ast
import importlib.util
import re
import sys
from pathlib import Path

import pytest

import lorafast
from lorafast.runtime import env

ROOT = Path(lorafast.__file__).resolve().parent.parent
README, DOCS = ROOT / "README.md", ROOT / "docs"
PAGES = [README, *sorted(DOCS.rglob("*.md"))]
CODE = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
HEADINGS = ["Equation", "Kept for backward", "Options", "Example", "What could not be checked"]


def _tool():
    # As for a script: its folder is where it looks for what it imports.
    sys.path.insert(0, str(ROOT / "tools"))
    spec = importlib.util.spec_from_file_location("readme_table", ROOT / "tools/readme_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


readme_table = _tool()


def named(path):
    return str(path.relative_to(ROOT))


def prose(path):
    """A page without its code, where # is not a heading and brackets are not a link."""
    return re.sub(r"^```.*?^```$|`[^`\n]+`", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(path):
    """The anchors of the page's headings."""
    found = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\s-]", "", one).strip().lower().replace(" ", "-") for one in found}


def pages_with_code():
    """The pages with code to run, those that import PEFT with its marker."""
    for page in PAGES:
        if CODE.search(page.read_text()):
            peft = re.search(r"^(?:import|from) peft\b", page.read_text(), re.MULTILINE)
            yield pytest.param(page, id=named(page), marks=[pytest.mark.peft] * bool(peft))


@pytest.mark.parametrize("page", list(pages_with_code()))
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for block in CODE.findall(page.read_text()):
        exec(compile(block, named(page), "exec"), namespace)


def test_readme_is_short():
    lines = README.read_text().splitlines()
    assert len(lines) <= 150
    assert not [line for line in lines if len(line) > 100 and "|" not in line and "](" not in line]


def test_readme_says_first_what_has_and_has_not_run_on_a_gpu():
    first = " ".join(README.read_text().split("\n\n")[1].split())
    assert "All of it has run on x86 CPUs under Linux, where every figure was measured" in first
    assert "nothing here has run on a GPU yet" in first
    assert "neither the plain PyTorch operations that would serve there nor the Triton" in first


def test_readme_says_to_merge_before_generating():
    assert "**Merge before you generate**" in " ".join(README.read_text().split())


def test_readme_and_index_count_the_methods():
    count = len(lorafast.list_methods())
    for page in (README, DOCS / "index.md"):
        assert f"(LoRA, DoRA, LaMDA and {count - 3} more methods)" in page.read_text()
    assert f"[All {count} methods]" in README.read_text()


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_tables_are_what_the_tool_writes(page):
    text = page.read_text()
    assert text.count("<!-- table: ") == text.count("<!-- end of table -->")
    assert readme_table.rendered(text) == text, "make readme-table"


def test_an_unknown_row_of_results_is_an_error():
    with pytest.raises(LookupError, match="no record"):
        readme_table.measured("peft lora", "layer", M=-1)


def test_the_environment_table_is_env_variables():
    row = re.compile(r"^\| `(LORAFAST_\w+)` \| (?:`([^`]+)` )?\| (.+) \|$", re.MULTILINE)
    rows = row.findall((DOCS / "environment.md").read_text())
    assert [env.Variable(*cells) for cells in rows] == list(env.VARIABLES)


def test_the_method_table_is_list_methods():
    text = (DOCS / "choosing.md").read_text()
    table = text.partition("| method | paper | trains | kept for backward | how to ask |\n")[2]
    rows = [line.strip("| ").split(" | ") for line in table.split("\n\n")[0].splitlines()[1:]]
    names = [method.name for method in lorafast.list_methods()]
    assert [re.match(r"\[(.+)\]", cells[0])[1] for cells in rows] == names
    for cells, method in zip(rows, lorafast.list_methods(), strict=True):
        assert cells[2:] == [method.trains, method.keeps, f"`{method.ask}`"]
        assert method.paper in cells[1]


def test_every_method_has_its_page_and_no_page_is_left_over():
    pages = {path.stem for path in (DOCS / "methods").glob("*.md")}
    assert pages == {readme_table.slug(method.name) for method in lorafast.list_methods()}


@pytest.mark.parametrize("method", lorafast.list_methods(), ids=lambda method: method.name)
def test_a_methods_page_answers_the_same_questions(method):
    page = DOCS / "methods" / f"{readme_table.slug(method.name)}.md"
    text = page.read_text()
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == HEADINGS
    assert f"<!-- table: method {method.name} -->" in text
    # The example asks for the method by the names that `ask` uses.
    asked = {node.id for node in ast.walk(ast.parse(method.ask)) if isinstance(node, ast.Name)}
    (example,) = CODE.findall(text)
    assert all(name in example for name in asked if hasattr(lorafast, name))


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_resolve(page):
    for link in LINK.findall(prose(page)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
        # A site of docs/ alone could not show what is outside.
        assert page == README or target.is_relative_to(ROOT / "bench") or DOCS in target.parents


def test_every_page_is_in_the_navigation():
    listed = re.findall(r"(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))


def test_every_public_name_is_in_the_reference():
    text = "".join(path.read_text() for path in (DOCS / "reference").glob("*.md"))
    documented = set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))
    public = {f"lorafast.{name}" for name in lorafast.__all__}
    public |= {f"lorafast.optim.{name}" for name in lorafast.optim.__all__}
    public |= {f"lorafast.schedule.{name}" for name in lorafast.schedule.__all__}
    public |= {"lorafast.reference.linear", "lorafast.reference.row_norm", "lorafast.testing"}
    assert public <= documented


def test_pictures_are_there():
    for page in PAGES:
        for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text()):
            assert (page.parent / picture).read_text().lstrip().startswith("<svg")
