"""Building and loading C++: once, on first use; a failure is one line that names it."""

import ctypes
import multiprocessing
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers.cpp_compiler import needs_compiler
from helpers.tiny_extension import FILES, compiler, refuses, write_sources

from lorafast.runtime import build_cache, env, extension, instruction_sets, toolchain

pytestmark = needs_compiler


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A tiny module's source, and an empty cache."""
    monkeypatch.setenv("LORAFAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LORAFAST_CXXFLAGS", "-O0")
    monkeypatch.delenv("CXX", raising=False)
    return write_sources(tmp_path / "so ur$ces")


def scalar(sources):
    """As a new process would have it."""
    extension._cpu.cache_clear()
    return extension.cpu("scalar", sources)


def module_of(sources, isa="scalar"):
    return extension.Module.of(isa, sources, env.cache(), env.cxxflags())


def reason(sources, *parts):
    """Why there is no module: one line with these parts in it."""
    said = scalar(sources)
    assert isinstance(said, str)
    assert "\n" not in said
    assert all(part in said for part in parts), said
    return said


def lines_of(capfd, start="lorafast: compiling"):
    return [line for line in capfd.readouterr().err.splitlines() if line.startswith(start)]


def test_it_builds_once_and_loads(sources, capfd, monkeypatch):
    built = scalar(sources)
    assert built.answer() == 42
    assert extension.cpu("scalar", sources) is built
    compiling, compiled = lines_of(capfd, "lorafast: ")
    begin = f"lorafast: compiling its CPU kernels for scalar, once, into {env.cache()}"
    assert re.fullmatch(rf"{re.escape(begin)} \(about \d+ s\)", compiling)
    assert re.fullmatch(r"lorafast: compiled its CPU kernels for scalar in \d+\.\d s", compiled)
    assert sorted(path.suffix for path in Path(env.cache()).iterdir()) == [".lock", ".log", ".so"]
    # Built ahead, then compiler and ninja go, and the cache may only be read.
    monkeypatch.setenv("CXX", "/nowhere/c++")
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setitem(sys.modules, "ninja", None)
    monkeypatch.setattr(build_cache, "locked", None)
    assert scalar(sources).answer() == 42
    assert not lines_of(capfd)


def test_the_best_instruction_set(sources, monkeypatch):
    monkeypatch.setenv("LORAFAST_CPU_ISA", " Auto ")
    built = extension.cpu(sources=sources)
    assert built.answer() == 42
    assert built.__spec__.name.startswith(f"lorafast_cpu_{instruction_sets.available()[0]}_")


def test_it_runs_on_torchs_threads(sources):
    def runtimes():
        return {
            line.split()[-1]
            for line in Path("/proc/self/maps").read_text().splitlines()
            if "libgomp" in line
        }

    before = runtimes()
    built = scalar(sources)
    assert runtimes() == before != set()
    for threads in (2, 1):
        torch.set_num_threads(threads)
        assert built.threads() == threads


def test_it_runs_on_torchs_threads_where_the_wheel_renamed_libgomp(sources, tmp_path, monkeypatch):
    ours = Path(torch.__file__).parent / "lib" / "libgomp.so.1"
    if not ours.exists():
        pytest.skip("this torch ships no libgomp")
    renamed = tmp_path / "torch.libs" / "libgomp-t.so"
    renamed.parent.mkdir()
    renamed.write_bytes(ours.read_bytes().replace(b"libgomp.so.1", b"libgomp-t.so"))
    assert toolchain.mangled_openmp(tmp_path) == renamed
    plain = module_of(sources).name
    monkeypatch.setattr(toolchain, "mangled_openmp", lambda: renamed)
    assert module_of(sources).name != plain
    ctypes.CDLL(str(renamed))
    module = scalar(sources).__spec__
    # Apart from the torch of this process, which has the real one loaded for everybody.
    probe = (
        "import ctypes, importlib.machinery as machinery, importlib.util as util\n"
        f"ctypes.CDLL({str(renamed)!r}).omp_set_num_threads(3)\n"
        f"loader = machinery.ExtensionFileLoader({module.name!r}, {module.origin!r})\n"
        f"spec = util.spec_from_loader({module.name!r}, loader)\n"
        "lines = [line for line in open('/proc/self/maps') if 'gomp' in line]\n"
        "print(util.module_from_spec(spec).threads(), {line.split()[-1] for line in lines})"
    )
    said = subprocess.run(
        [sys.executable, "-I", "-c", probe], capture_output=True, text=True, check=True
    ).stdout
    assert said.strip() == f"3 { {str(renamed)} }"


def _meet_and_build(barrier, sources):
    barrier.wait()
    sys.exit(extension.cpu("scalar", sources).answer() != 42)


@pytest.mark.parametrize("kind", ["processes", "threads"])
def test_one_builds_while_the_others_wait(sources, capfd, kind):
    if kind == "processes":
        here = multiprocessing.get_context("fork")
        barrier = here.Barrier(3)
        workers = [here.Process(target=_meet_and_build, args=(barrier, sources)) for _ in range(3)]
    else:
        answers = []
        workers = [
            threading.Thread(
                target=lambda: answers.append(extension.cpu("scalar", sources).answer())
            )
            for _ in range(3)
        ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert (
        [worker.exitcode for worker in workers] == [0, 0, 0]
        if kind == "processes"
        else answers == [42, 42, 42]
    )
    assert len(lines_of(capfd)) == 1


def test_a_killed_build_leaves_nothing_behind_that_is_used(sources, tmp_path, monkeypatch):
    monkeypatch.setenv(
        "CXX",
        compiler(tmp_path, f"case $word in -c) touch {tmp_path}/started; exec sleep 5;; esac"),
    )
    here = multiprocessing.get_context("fork")
    worker = here.Process(target=_meet_and_build, args=(here.Barrier(1), sources))
    worker.start()
    while not (tmp_path / "started").exists():
        assert worker.is_alive()
        time.sleep(0.01)
    worker.kill()
    worker.join()
    assert list(Path(env.cache()).glob("*.build-*"))
    monkeypatch.delenv("CXX")
    assert scalar(sources).answer() == 42
    assert not list(Path(env.cache()).glob("*.build-*"))


def test_a_module_cut_short_is_built_again(sources, capfd):
    path = Path(scalar(sources).__file__)
    content = path.read_bytes()
    # Another file: a loaded one that shrinks takes its process with it.
    path.unlink()
    path.write_bytes(content[: len(content) // 2])
    assert not build_cache.is_complete(path)
    assert scalar(sources).answer() == 42
    assert len(lines_of(capfd)) == 2


def test_a_module_that_does_not_load_is_built_again(sources, capfd):
    path = module_of(sources).path
    path.parent.mkdir()
    path.write_bytes(b"made for another machine")
    build_cache.seal(path)
    assert scalar(sources).answer() == 42
    assert len(lines_of(capfd)) == 1


def test_a_module_that_never_loads_is_a_reason(sources, capfd):
    (sources / "threads.cpp").unlink()
    reason(sources, str(module_of(sources).path), "cannot be loaded", "undefined symbol")
    assert len(lines_of(capfd)) == 1
    # Remembered, so that it is not built again.
    reason(sources, "undefined symbol", "to try again, delete")
    assert not lines_of(capfd)


def test_the_name_tells_what_a_module_is_made_of(sources, monkeypatch):
    first = module_of(sources)
    (sources / "notes.md").write_text("no source")
    assert module_of(sources) == first
    names = {first.name, module_of(sources, "avx2").name}
    monkeypatch.setenv("LORAFAST_CXXFLAGS", "-O1")
    names.add(module_of(sources).name)
    (sources / "answer.h").write_text(FILES["answer.h"].replace("42", "43"))
    names.add(module_of(sources).name)
    (sources / "threads.cpp").rename(sources / "pool.cpp")
    names.add(module_of(sources).name)
    assert len(names) == 5
    assert scalar(sources).answer() == 43


def test_a_compile_error_is_a_reason_with_the_log_beside(sources, monkeypatch):
    (sources / "answer.h").write_text("constexpr long kAnswer = forty_two;\nnonsense")
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    log = Path(env.cache()) / f"{module_of(sources).name}.log"
    reason(sources, "answer.h:1:", "error:", "forty_two", f"all of it: {log}")
    assert "nonsense" in log.read_text()
    assert log.read_text().startswith(f"{shutil.which('c++')}: ")
    assert not list(log.parent.glob("*.so"))


@pytest.mark.parametrize("how", ["refused", "no header"])
def test_no_openmp_is_a_reason(sources, tmp_path, monkeypatch, how):
    script = (
        refuses("-fopenmp")
        if how == "refused"
        else 'case $word in -fopenmp) set -- "$@" -nostdinc;; esac'
    )
    monkeypatch.setenv("CXX", compiler(tmp_path, script))
    if how == "no header":
        (sources / "bindings.cpp").unlink()
    reason(
        sources,
        f"{tmp_path}/cxx has no OpenMP",
        "install libgomp",
        "fopenmp" if how == "refused" else "omp.h",
    )


def test_no_compiler_is_a_reason(sources, tmp_path, monkeypatch):
    for cxx, said in (
        ("/nowhere/c++ -x", "no such program"),
        ("c++ '", "No closing quotation"),
        ("false", "does not run"),
    ):
        monkeypatch.setenv("CXX", cxx)
        reason(sources, cxx, said)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    reason(sources, "no C++ compiler: CXX is not set, and none of c++, g++, clang++ is on the PATH")


@pytest.mark.parametrize("missing", ["ninja", "Python.h"])
def test_a_missing_tool_is_a_reason(sources, tmp_path, monkeypatch, missing):
    which = shutil.which
    monkeypatch.setattr(
        shutil, "which", lambda name, path=None: None if name == missing else which(name, path=path)
    )
    monkeypatch.setitem(sys.modules, missing, None)
    if missing == "Python.h":
        monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    reason(sources, missing, "install")


def test_where_builds_are_kept(monkeypatch):
    for name in ("LORAFAST_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/of/mine")
    assert env.cache() == "/home/of/mine/.cache/lorafast"
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert env.cache() == "/caches/lorafast"
    monkeypatch.setenv("LORAFAST_CACHE", "~/mine")
    assert env.cache() == "/home/of/mine/mine"


def test_an_old_compiler_serves_what_it_knows(sources, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(instruction_sets, "available", lambda: ("avx2", "scalar"))
    monkeypatch.setenv("CXX", f"env {compiler(tmp_path, refuses('-mavx*'))}")
    assert extension.cpu("auto", sources).__spec__.name == module_of(sources).name
    assert "does not take -mavx2 -mfma -mf16c -mbmi2" in extension.cpu("avx2", sources)
    assert len(lines_of(capfd)) == 1


@pytest.mark.parametrize(
    ("said", "how"),
    [
        (
            "built on Linux only, not on win32",
            lambda patch, sources: patch.setattr(sys, "platform", "win32"),
        ),
        (
            "LORAFAST_CXXFLAGS=-D' cannot be read",
            lambda patch, sources: patch.setenv("LORAFAST_CXXFLAGS", "-D'"),
        ),
        (
            "there is no C++ in",
            lambda patch, sources: [path.unlink() for path in sources.glob("*.cpp")],
        ),
        (
            "sources cannot be read",
            lambda patch, sources: (sources / "gone.h").symlink_to("nowhere"),
        ),
    ],
)
def test_other_reasons(sources, monkeypatch, said, how):
    how(monkeypatch, sources)
    reason(sources, said)
