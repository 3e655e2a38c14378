"""import lorafast before and after torch: the same names, and no torch until one is used."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import lorafast

LAZY = """
import sys
import lorafast
assert "torch" not in sys.modules
assert {*lorafast.__all__, "optim", "reference", "schedule", "__version__"} <= {*dir(lorafast)}
assert not hasattr(lorafast, "no_such_name") and not hasattr(lorafast, "__wrapped__")
assert "torch" not in sys.modules
"""


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_name_is_the_one_that_type_checkers_see():
    tree = ast.parse(Path(lorafast.__file__).read_text())
    (block,) = (
        node
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    seen = {
        alias.name: node.module
        for node in block.body
        for alias in node.names
        if node.module != "lorafast"
    }
    listed = {
        name: f"lorafast.{module}"
        for module, names in lorafast._DEFINED_IN.items()
        for name in names
    }
    assert listed == seen
    assert sorted(listed) == sorted(lorafast.__all__)
    for name, module in listed.items():
        assert getattr(lorafast, name) is getattr(importlib.import_module(module), name)


@pytest.mark.parametrize(
    "use",
    [
        "from lorafast import *; assert adapt is lorafast.adapt and LoRA(r=4).r == 4",
        pytest.param(
            "import pickle\n"
            "assert pickle.loads(b'clorafast.layer\\nLinear\\n.') is lorafast.Linear",
            marks=pytest.mark.slow,
        ),
        "assert lorafast.optim.LoRAPlus and lorafast.models.merge.merge is lorafast.merge\n"
        "assert lorafast.reference.linear and lorafast.schedule.LISA",
        pytest.param(
            "import torch, lorafast.functional; assert torch.ops.lorafast.linear.default",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_name_used_later_is_what_it_is_after_torch(use):
    run(f"{LAZY}{use}\nassert 'torch' in sys.modules")


def test_after_torch_everything_is_imported_at_once():
    run(
        "import torch, lorafast\n"
        "assert {*lorafast.__all__, 'optim', 'reference', 'schedule'} <= {*vars(lorafast)}\n"
        "assert torch.ops.lorafast.linear.default"
    )


def test_once_torch_is_imported_later_so_is_everything():
    run(f"""{LAZY}
import torch
assert torch.ops.lorafast.linear.default and torch.ops.lorafast.several.default
assert {{*lorafast.__all__, "optim", "reference", "schedule"}} <= {{*vars(lorafast)}}
""")


@pytest.mark.slow
def test_torch_is_imported_where_lorafast_cannot_be():
    run(f"""{LAZY}
sys.modules["lorafast.registry"] = None
import torch
try:
    lorafast.list_methods
except ModuleNotFoundError as error:
    assert error.name == "lorafast.registry"
else:
    raise AssertionError
""")


def test_names_are_first_used_in_several_threads():
    run(f"""{LAZY}
import threading
def use(name):
    found[name] = getattr(lorafast, name)
found = {{}}
threads = [threading.Thread(target=use, args=(name,)) for name in lorafast.__all__]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert found == {{name: getattr(lorafast, name) for name in lorafast.__all__}}
""")


@pytest.mark.slow
@pytest.mark.compile
def test_a_name_is_first_used_below_torch_compile():
    run(f"""{LAZY}
import torch
@torch.compile(fullgraph=True, backend="eager")
def call(x, weight, A, B):
    return lorafast.linear(x, weight, None, A, B)
x, weight, A, B = (torch.randn(*shape) for shape in ((3, 8), (4, 8), (2, 8), (4, 2)))
torch.testing.assert_close(call(x, weight, A, B), lorafast.linear(x, weight, None, A, B))
""")


def test_no_module_of_ours_imports_a_public_name_from_the_package():
    """It would import every module while it is itself being imported."""
    for path in Path(lorafast.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "lorafast":
                names = {alias.name for alias in node.names}
                assert not names & {*lorafast.__all__}, path
