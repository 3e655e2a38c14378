"""A plain install: the wheel in a bare environment, with what it declares and nothing else.

README's code and the examples run there; what needs an extra runs once the extra is installed.
"""

import ast
import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers.packages import ROOT, copy_checkout, run, wheel_of

from lorafast.runtime import extras

pytestmark = pytest.mark.slow

CODE = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
EXTRA_OF = {package: extra for extra, packages in extras.EXTRAS.items() for package in packages}

# Imports every module of the package, and prints what is missing for those that fail.
IMPORT_ALL = """
import importlib, json, pkgutil
import lorafast

missing = {}
for module in pkgutil.walk_packages(lorafast.__path__, "lorafast."):
    if not module.name.endswith("__main__"):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            missing[module.name] = error.name, str(error)
print(json.dumps(missing))
"""
# Asks for what needs an extra.
ASK = """
import torch, lorafast

model = torch.nn.Sequential(torch.nn.Linear(4, 4))
for call in (lambda: lorafast.accelerate(model), lambda: lorafast.load_adapter(model, "some/one")):
    try:
        call()
    except (ImportError, FileNotFoundError) as error:
        print(error)
"""
SETTINGS = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def pip(python, *words, cwd):
    """Run pip of an environment. It compiles no bytecode: most of torch is never imported."""
    options = ("--quiet", "--disable-pip-version-check", "--no-compile")
    constraints = ("--constraint", ROOT / "constraints.txt")
    run(python, "-m", "pip", "install", *options, *constraints, *words, cwd=cwd)


def scripts():
    """{name: source} of README's snippets, each on its own, and of the examples."""
    snippets = CODE.findall((ROOT / "README.md").read_text())
    named = {f"README.md, snippet {i}": source for i, source in enumerate(snippets)}
    return named | {path.name: path.read_text() for path in (ROOT / "examples").glob("*.py")}


def needed_extras(source):
    """The extras that bring a package which a script imports."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        found |= {EXTRA_OF.get(name.partition(".")[0]) for name in names} - {None}
    return found


def run_scripts(python, sources, folder):
    """Run each script on its own, two at a time: most of their time is importing."""

    def run_script(name):
        place = folder / re.sub(r"\W", "-", name)
        place.mkdir()
        (place / "script.py").write_text(sources[name])
        return run(python, "script.py", cwd=place, check=False, **SETTINGS)

    with ThreadPoolExecutor(2) as pool:
        for name, done in zip(sources, pool.map(run_script, sources), strict=True):
            assert done.returncode == 0, f"{name}\n{done.stdout}{done.stderr}"
            # Torch warns and goes on where it finds no numpy.
            assert "No module named" not in done.stderr, f"{name}\n{done.stderr}"


def check_without_extras(python, folder):
    """All of lorafast can be imported, or says which extra it needs."""
    missing = json.loads(run(python, "-c", IMPORT_ALL, cwd=folder).stdout)
    for module, (package, message) in missing.items():
        assert package in {*EXTRA_OF, "pytest"}, f"{module}: {message}"
        if module.startswith("lorafast.integrations."):
            assert extras.how_to_install("peft") in message
    told = run(python, "-c", ASK, cwd=folder).stdout.splitlines()
    for line, extra in zip(told, ("peft", "hub"), strict=True):
        assert extras.how_to_install(extra) in line
    for command in ("env", "linear"):
        done = run(python.with_name("lorafast-bench"), command, cwd=folder, check=False)
        assert done.returncode == 2
        assert extras.how_to_install("bench") in done.stderr


def test_a_plain_install_runs_the_readme_and_the_examples(tmp_path):
    venv, folder = tmp_path / "venv", tmp_path / "elsewhere"
    folder.mkdir()
    wheel = wheel_of(copy_checkout(tmp_path / "checkout"), tmp_path / "wheel")
    run(sys.executable, "-m", "venv", venv, cwd=tmp_path)
    python = venv / "bin" / "python"
    pip(python, "torch", wheel, cwd=folder)
    sources = scripts()
    plain = {name: source for name, source in sources.items() if not needed_extras(source)}
    assert len(plain) >= 4
    check_without_extras(python, folder)
    run_scripts(python, plain, folder)

    others = {name: source for name, source in sources.items() if name not in plain}
    assert set().union(*map(needed_extras, others.values())) == {"peft"}
    pip(python, f"{wheel}[peft]", cwd=folder)
    run_scripts(python, others, folder)
