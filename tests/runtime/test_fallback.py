"""The one warning that eager serves where the CPU kernels would: when, how often, what it says."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from helpers.backends import problem
from helpers.cpp_compiler import needs_compiler
from helpers.tiny_extension import compiler, dies

import lorafast
from lorafast.engine import dispatch
from lorafast.engine.backends import cpu
from lorafast.runtime import extension, fallback
from lorafast.runtime.devices import Arch

NOT_BUILT = fallback.Remediable("no compiler; install g++")


@pytest.fixture
def layer(monkeypatch, few_tokens_by_op):
    """A layer in a process that has warned of nothing, where the kernels cannot be built."""
    monkeypatch.setattr(fallback, "_to_issue", [True])
    monkeypatch.setattr(cpu, "library", lambda: NOT_BUILT)
    dispatch._routes.cache_clear()
    yield lorafast.Linear(24, 32, adapter=lorafast.LoRA(r=4))
    dispatch._routes.cache_clear()


def run_on(layer, dtype=torch.float32):
    """Train a step, with the warnings of it as a list of texts."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        layer.to(dtype)(torch.randn(3, 24, dtype=dtype)).sum().backward()
    assert all(warning.category is lorafast.FallbackWarning for warning in seen)
    return [str(warning.message) for warning in seen]


def test_it_comes_once_with_reason_and_remedy(layer):
    (said,) = run_on(layer)
    for part in ("CPU kernels", "eager backend serves", NOT_BUILT, "LORAFAST_BACKEND=eager"):
        assert part in said
    assert run_on(layer) == []
    dispatch._routes.cache_clear()
    assert run_on(layer, torch.bfloat16) == []


def test_it_comes_once_from_several_threads(layer, monkeypatch):
    barrier, found = threading.Barrier(8), []
    monkeypatch.setattr(warnings, "warn", lambda *args, **_: found.append(args))

    def call():
        barrier.wait()
        layer(torch.randn(3, 24))

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 1


def test_it_can_be_an_error_or_ignored_by_its_category(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("error", lorafast.FallbackWarning)
        with pytest.raises(lorafast.FallbackWarning, match="install g"):
            layer(torch.randn(3, 24))
        assert layer(torch.randn(3, 24)).isfinite().all()
    assert issubclass(lorafast.FallbackWarning, RuntimeWarning)


@pytest.mark.compile
def test_a_compiled_layer_warns_when_it_runs(layer):
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with pytest.warns(lorafast.FallbackWarning) as seen:
        compiled(torch.randn(3, 24)).sum().backward()
    assert len(seen) == 1


def test_nothing_is_said_where_the_kernels_would_not_serve(layer, monkeypatch):
    assert run_on(layer, torch.float64) == []
    assert run_on(lorafast.Linear(24, 320, adapter=lorafast.LoRA(r=300))) == []
    monkeypatch.setenv("LORAFAST_BACKEND", "eager")
    assert run_on(layer) == []


def test_explain_gives_the_reason_and_no_warning(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert NOT_BUILT in str(lorafast.explain(layer))


def test_a_platform_without_kernels_is_no_reason_to_warn(layer, monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    extension._cpu.cache_clear()
    why = extension.cpu("scalar")
    extension._cpu.cache_clear()
    monkeypatch.setattr(cpu, "library", lambda: why)
    assert "Linux only" in str(lorafast.explain(layer))
    assert run_on(layer) == []


def test_nothing_is_said_of_the_cpu_to_another_device(layer, monkeypatch):
    load, broken = dispatch.load, fallback.Remediable("cannot be loaded")
    monkeypatch.setattr(dispatch, "load", lambda name: broken if name == "cpu" else load(name))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.pick("project", problem(arch=Arch("mps", "mps"))).__name__.endswith("eager")


def test_a_backend_that_cannot_be_imported_is_said_too(layer, monkeypatch):
    importing = importlib.import_module

    def broken(name, *args):
        if name.endswith("backends.cpu"):
            raise ImportError("cut short")
        return importing(name, *args)

    dispatch.load.cache_clear()
    monkeypatch.setattr(importlib, "import_module", broken)
    try:
        (said,) = run_on(layer)
    finally:
        dispatch.load.cache_clear()
    assert "cannot be loaded: ImportError: cut short" in said


WALK = """
import copy, json, os, sys, warnings
import torch, lorafast

torch.manual_seed(0)
torch.set_num_threads(1)
base = torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.Tanh(), torch.nn.Linear(40, 8))
# More tokens than those that need no kernels.
x, y = torch.randn(6000, 24), torch.randn(6000, 8)

def adapted(model, kind):
    if kind == "adapt":
        return lorafast.adapt(model, lorafast.LoRA(r=4))
    import peft
    config = peft.LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False)
    model = peft.get_peft_model(model, config)
    lorafast.accelerate(model)
    return model

def trained(model, dtype):
    model = copy.deepcopy(model).to(dtype)
    factors = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(factors, lr=0.1)
    for _ in range(3):
        torch.nn.functional.mse_loss(model(x.to(dtype)), y.to(dtype)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, torch.cat([p.detach().double().flatten() for p in factors])

found = {"ratios": []}
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for kind in ("adapt", "accelerate"):
        model = adapted(copy.deepcopy(base), kind)
        done, ours = trained(model, torch.float32)
        if kind == "adapt":
            lorafast.save_adapter(done, sys.argv[1])
        os.environ["LORAFAST_BACKEND"] = "eager"
        eager, truth = trained(model, torch.float32)[1], trained(model, torch.float64)[1]
        del os.environ["LORAFAST_BACKEND"]
        error, least = lambda z: (z - truth).norm(), 2**-26 * truth.norm()
        found["ratios"].append(float(max(error(ours), least) / max(error(eager), least)))
found["warnings"] = [(w.category.__name__, str(w.message)) for w in seen
                     if "lorafast" in str(w.message)]
from lorafast.engine.backends import cpu
found["library"] = getattr(cpu.library(), "__file__", None)
print(json.dumps(found))
"""


def walk(tmp_path, prefix=(), **variables):
    """Adapt, accelerate, train and save in a new process; what it says of itself, and stderr."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("LORAFAST_", "XDG_", "CXX"))
    }
    saved, temporary = tmp_path / "saved", tmp_path / "temporary"
    temporary.mkdir(exist_ok=True)
    environment |= {"TMPDIR": str(temporary), "LORAFAST_CPU_ISA": "scalar", **variables}
    done = subprocess.run(
        [*prefix, sys.executable, "-c", WALK, str(saved)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert max(found["ratios"]) <= 2
    assert (saved / "adapter_model.safetensors").exists()
    ((category, message),) = found["warnings"]
    assert category == "FallbackWarning"
    return message, found["library"]


@pytest.mark.slow
@pytest.mark.peft
@pytest.mark.skipif(sys.platform != "linux", reason="no kernels are built elsewhere")
def test_without_a_compiler_everything_works_and_one_warning_says_so(tmp_path):
    message, library = walk(tmp_path, PATH=str(tmp_path), LORAFAST_CACHE=str(tmp_path / "cache"))
    assert library is None
    assert "there is no C++ compiler" in message
    assert "install g++" in message


@needs_compiler
@pytest.mark.slow
@pytest.mark.peft
@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("exit 1", "does not run"),
        (dies("exit 1"), "it stops without a message"),
        (dies("kill -9 $$"), "Killed"),
    ],
)
def test_with_a_compiler_that_dies_too(tmp_path, script, reason):
    cxx = compiler(tmp_path, script)
    variables = {"CXX": cxx, "LORAFAST_CACHE": str(tmp_path / "cache")}
    message, library = walk(tmp_path, **variables)
    assert library is None
    for part in (cxx, reason, "install g++ or set CXX to another compiler"):
        assert part in message
    if "does not run" not in reason:
        assert "to try again, delete" in walk(tmp_path, **variables)[0]


@needs_compiler
@pytest.mark.slow
@pytest.mark.peft
@pytest.mark.parametrize("how", ["home below a file", "cache below a file", "read-only home"])
def test_without_a_folder_to_write_the_kernels_serve_from_a_temporary_one(tmp_path, how):
    (tmp_path / "file").touch()
    unwritable = tmp_path / "file" / "home"
    variables, prefix = {"HOME": str(unwritable), "LORAFAST_CXXFLAGS": "-O0"}, ()
    if how == "cache below a file":
        variables |= {"HOME": str(tmp_path), "LORAFAST_CACHE": str(unwritable)}
    elif how == "read-only home":
        unwritable = tmp_path / "home"
        unwritable.mkdir(mode=0o500)
        variables["HOME"] = str(unwritable)
        if os.geteuid() == 0:
            # root writes everywhere, until it gives that up.
            setpriv = shutil.which("setpriv") or pytest.skip("root cannot become less here")
            prefix = (setpriv, "--bounding-set=-dac_override,-dac_read_search")
    message, library = walk(tmp_path, prefix, **variables)
    assert Path(library).is_relative_to(tmp_path / "temporary")
    for part in (str(unwritable), "cannot be used", "set LORAFAST_CACHE to a folder that can be"):
        assert part in message
