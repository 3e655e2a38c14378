"""python -m lorafast: its help without torch, and kernels built ahead of their first use."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.cpp_compiler import needs_compiler
from helpers.tiny_extension import compiler, dies, refuses, write_sources

from lorafast import __main__ as command_line
from lorafast.runtime import build_cache, env, extension, instruction_sets, torch_internals
from lorafast.runtime.extension import Module


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A tiny module in place of the kernels, on a machine with AVX2, and an empty cache."""
    monkeypatch.setattr(extension, "SOURCES", write_sources(tmp_path / "sources"))
    for name in ("HOST", "LAUNCHER"):
        part = getattr(extension, name)
        tiny = part._replace(sources=write_sources(tmp_path / part.label))
        monkeypatch.setattr(extension, name, tiny)
    monkeypatch.setattr(instruction_sets, "available", lambda: ("avx2", "scalar"))
    monkeypatch.setenv("LORAFAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LORAFAST_CXXFLAGS", "-O0")
    for name in ("CXX", "LORAFAST_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    return extension.SOURCES


def path_of(isa):
    return Module.of(isa, extension.SOURCES, env.cache(), env.cxxflags()).path


def path_of_part(part):
    return Module.of_torch(part, env.cache(), env.cxxflags()).path


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["build", "--help"], ["run", "--help"], ["compile"], ["build", "--al"], []],
)
def test_the_command_line_answers_without_torch(arguments):
    probe = (
        "import runpy, sys\n"
        f"sys.argv = ['lorafast', *{arguments}]\n"
        "try:\n    runpy.run_module('lorafast', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as end:\n    print(end.code, 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == ("0 False" if "--help" in arguments else "2 False")
    assert {"build", "run"} & {*re.findall(r"\w+", done.stdout + done.stderr)}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["builf"], ": 'builf' is none of build, run, export; did you mean build?"),
        (["--hepl"], ": '--hepl' is no option; did you mean --help?"),
        (["--hel", "build"], ": '--hel' is no option; did you mean --help?"),
        ([], ": COMMAND is missing, one of build, run, export"),
        (["build", "--isa", "avx51"], " build: --isa: 'avx51' is none of auto, "),
        (["build", "--isa", "avx51"], "; did you mean avx512?"),
        (["build", "--isa=avx-2"], "; did you mean avx2?"),
        (["build", "--al"], " build: '--al' is no option; did you mean --all?"),
        (["build", "--is", "avx2"], " build: '--is' is no option; did you mean --isa?"),
        (["build", "avx2"], " build: 'avx2' is no option; python -m lorafast build --help lists"),
        (["build", "--all", "--isa", "avx2"], " build: --isa: not allowed with argument --all"),
    ],
)
def test_an_invalid_word_is_one_line_that_names_the_nearest(words, message, capsys, monkeypatch):
    monkeypatch.setattr(command_line, "build_kernels", None)
    with pytest.raises(SystemExit) as stop:
        command_line.main(words)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m lorafast")
    assert message in line


@needs_compiler
def test_it_builds_what_this_machine_would_use(sources, capsys, monkeypatch):
    assert command_line.main(["build"]) == 0
    kernels, host = capsys.readouterr().out.splitlines()
    assert kernels.startswith(f"avx2: {path_of('avx2')} (built in ")
    assert host.startswith(f"host path: {path_of_part(extension.HOST)} (built in ")
    assert host.endswith(" s)")
    monkeypatch.setenv("CXX", "/nowhere/c++")
    assert command_line.main(["build", "--isa", "auto"]) == 0
    kernels, host = capsys.readouterr().out.splitlines()
    assert kernels == f"avx2: {path_of('avx2')} (built before)"
    assert host == f"host path: {path_of_part(extension.HOST)} (built before)"
    assert not path_of("scalar").exists()


@needs_compiler
def test_the_environment_or_the_option_names_another(sources, capsys, monkeypatch):
    monkeypatch.setenv("LORAFAST_CPU_ISA", "scalar")
    assert command_line.main(["build"]) == 0
    assert path_of("scalar").exists()
    # One that this machine lacks, for another machine.
    assert command_line.main(["build", "--isa", "avx512"]) == 0
    assert path_of("avx512").exists()
    for asked in ("avx512", "sse9"):
        monkeypatch.setenv("LORAFAST_CPU_ISA", asked)
        with pytest.raises(SystemExit) as end:
            command_line.main(["build"])
        assert end.value.code == 2
        *_, line = capsys.readouterr().err.splitlines()
        assert line.startswith(f"python -m lorafast build: LORAFAST_CPU_ISA={asked}")


@needs_compiler
def test_an_old_compiler_builds_what_it_knows(sources, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CXX", compiler(tmp_path, refuses("-mavx*")))
    assert command_line.main(["build"]) == 0
    unknown, built, _ = capsys.readouterr().out.splitlines()
    assert unknown.startswith("avx2: ")
    assert "does not take -mavx2 -mfma -mf16c -mbmi2" in unknown
    assert built.startswith(f"scalar: {path_of('scalar')} (built in ")
    # All of them: what it does not know is no failure.
    assert command_line.main(["build", "--all"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said] == [*instruction_sets.ISAS, "host path"]
    assert said[-2] == f"scalar: {path_of('scalar')} (built before)"
    assert command_line.main(["build", "--isa", "avx512"]) == 1


@needs_compiler
def test_what_fails_is_said_and_tried_again_each_time(sources, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CXX", compiler(tmp_path, dies("exit 1")))
    for _ in range(2):
        assert command_line.main(["build"]) == 1
        said = capsys.readouterr()
        assert "it stops without a message" in said.out
        assert "failed before" not in said.out
        assert "compiling" in said.err
    assert command_line.main(["build", "--all"]) == 1
    assert len(capsys.readouterr().out.splitlines()) == len(instruction_sets.ISAS) + 1


@needs_compiler
def test_the_launcher_is_built_where_torch_knows_cuda(sources, capsys, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert command_line.main(["build"]) == 0
    _, host, launcher = capsys.readouterr().out.splitlines()
    assert host.startswith("host path: ")
    assert launcher.startswith(f"launcher: {path_of_part(extension.LAUNCHER)} (built in ")


@needs_compiler
@pytest.mark.parametrize("why", ["LORAFAST_HOST=0 is set", "it is not tested with this torch"])
def test_what_calls_torch_is_built_where_it_is_used(sources, capsys, monkeypatch, why):
    if "set" in why:
        monkeypatch.setenv("LORAFAST_HOST", "0")
    else:
        monkeypatch.setattr(torch_internals, "enabled", False)
    assert command_line.main(["build"]) == 0
    _, host = capsys.readouterr().out.splitlines()
    assert host == f"host path: not built, because {why}"
    assert extension.host() == extension.launcher() == why


@needs_compiler
def test_a_host_path_that_cannot_be_built_is_a_failure(sources, capsys):
    (extension.HOST.sources / "bindings.cpp").write_text("#error no such torch")
    assert command_line.main(["build"]) == 1
    kernels, host = capsys.readouterr().out.splitlines()
    assert "built in" in kernels
    assert host.startswith("host path: the compiler")
    assert "no such torch" in host


@needs_compiler
def test_a_module_that_cannot_be_loaded_is_built_again(sources, capsys):
    for isa, said in (("avx2", "(built in "), ("avx512", "(built before)")):
        path_of(isa).parent.mkdir(exist_ok=True)
        path_of(isa).write_bytes(b"made for another machine")
        build_cache.seal(path_of(isa))
        # Whether one loads that this machine cannot run is not known here.
        assert command_line.main(["build", "--isa", isa]) == 0
        assert said in capsys.readouterr().out
    assert command_line.main(["build", "--isa", "avx2"]) == 0
    assert "(built before)" in capsys.readouterr().out


@needs_compiler
def test_a_module_that_never_loads_is_a_failure_until_it_does(
    sources, tmp_path, capsys, monkeypatch
):
    renames = 'case $word in -DLORAFAST_MODULE=*) set -- "$@" -DLORAFAST_MODULE=other;; esac'
    monkeypatch.setenv("CXX", compiler(tmp_path, renames))
    for _ in range(2):
        assert command_line.main(["build"]) == 1
        said = capsys.readouterr()
        assert f"avx2: {path_of('avx2')} cannot be loaded: " in said.out
        assert "compiling" in said.err
    monkeypatch.delenv("CXX")
    assert command_line.main(["build"]) == 0
    assert "(built in " in capsys.readouterr().out


@pytest.mark.parametrize("cache", ["/proc/nowhere", "~no-such-user/cache"])
def test_a_cache_that_cannot_be_written_is_an_error(sources, capsys, monkeypatch, cache):
    monkeypatch.setenv("LORAFAST_CACHE", cache)
    assert command_line.main(["build"]) == 1
    said = capsys.readouterr().out
    assert f"LORAFAST_CACHE: {cache} cannot be used" in said
    assert "set LORAFAST_CACHE to a folder that can be written" in said
    assert not Path("~no-such-user").exists()
