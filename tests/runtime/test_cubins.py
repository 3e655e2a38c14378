"""Cubins: compiled when first needed, kept whole in the cache, never in the way."""

from pathlib import Path

import pytest
from helpers.tiny_cuda import OPTIONS, write_kernel

from lorafast.runtime import build_cache, cubins, cuda_compiler, env
from lorafast.runtime.cuda_compiler import Compiler
from lorafast.runtime.toolchain import Failure


class Compilations:
    """What takes the compiler's place: it makes a cubin of the names it is given."""

    def __init__(self, monkeypatch):
        self.asked, self.monkeypatch = [], monkeypatch
        self.name = "NVRTC 13.0"

    def __call__(self, source, architecture, options):
        self.asked.append((source.name, architecture, *options))
        return repr(self.asked[-1]).encode()

    @property
    def name(self):
        return self._name

    @name.setter
    def name(self, value):
        self._name = value
        self.monkeypatch.setattr(cuda_compiler, "find", lambda: Compiler(value, self))


@pytest.fixture
def compilations(tmp_path, monkeypatch):
    monkeypatch.setenv("LORAFAST_CACHE", str(tmp_path / "cache"))
    cubins._say_once.cache_clear()
    return Compilations(monkeypatch)


@pytest.fixture
def source(tmp_path):
    return write_kernel(tmp_path / "sources")


def kept():
    return sorted(path.name for path in Path(env.cache()).iterdir())


def test_a_form_is_compiled_once_and_kept(compilations, source, capfd):
    made = cubins.cubin(source, "sm_90", OPTIONS)
    assert made == repr(("tiny.cu", "sm_90", *OPTIONS)).encode()
    assert cubins.cubin(source, "sm_90", OPTIONS) == made
    assert len(compilations.asked) == 1
    lock, name = kept()
    assert lock == "cuda.lock"
    assert name.startswith("cuda_tiny_sm_90_")
    assert capfd.readouterr().err == (
        "lorafast: compiling its CUDA kernels for sm_90 by NVRTC 13.0, each when it is first "
        f"needed, once, into {env.cache()}\n"
    )
    cubins.cubin(source, "sm_90", ("-DENTRY=other",))
    assert not capfd.readouterr().err


def test_whatever_a_form_is_made_of_is_in_its_name(compilations, source):
    cubins.cubin(source, "sm_90", OPTIONS)
    cubins.cubin(source, "sm_80", OPTIONS)
    cubins.cubin(source, "sm_90", ("-DENTRY=other",))
    compilations.name = "NVRTC 13.1"
    cubins.cubin(source, "sm_90", OPTIONS)
    header = source.parent / "number.cuh"
    header.write_text(header.read_text().replace("42", "43"))
    cubins.cubin(source, "sm_90", OPTIONS)
    assert len(compilations.asked) == 5
    assert len(kept()) == 6
    (source.parent / "notes.md").write_text("no source")
    cubins.cubin(source, "sm_90", OPTIONS)
    assert len(compilations.asked) == 5


def test_a_file_cut_short_is_made_again(compilations, source):
    made = cubins.cubin(source, "sm_90", OPTIONS)
    path = next(Path(env.cache()).glob("*.cubin"))
    path.write_bytes(path.read_bytes()[:-5])
    assert cubins.cubin(source, "sm_90", OPTIONS) == made
    assert len(compilations.asked) == 2
    assert build_cache.is_complete(path)


def test_a_cache_that_cannot_be_written_keeps_nothing(compilations, source, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for cache in (f"{tmp_path}/file/cache", "~no-such-user/cache"):
        monkeypatch.setenv("LORAFAST_CACHE", cache)
        assert cubins.cubin(source, "sm_90", OPTIONS)
    assert len(compilations.asked) == 2


def test_what_fails_leaves_nothing(compilations, source, monkeypatch):
    def fails(*_):
        raise Failure("NVRTC 13.0 does not compile tiny.cu")

    monkeypatch.setattr(cuda_compiler, "find", lambda: Compiler("NVRTC 13.0", fails))
    with pytest.raises(Failure, match=r"does not compile tiny\.cu"):
        cubins.cubin(source, "sm_90", OPTIONS)
    assert kept() == ["cuda.lock"]
    monkeypatch.setattr(cuda_compiler, "find", lambda: "there is no NVRTC")
    with pytest.raises(Failure, match="there is no NVRTC"):
        cubins.cubin(source, "sm_90", OPTIONS)
    source.unlink()
    with pytest.raises(Failure):
        cubins.cubin(source, "sm_90", OPTIONS)
