"""CUDA C++ compiled by NVRTC and by nvcc, without a GPU; a failure is one line that names it."""

import ctypes
import shutil
from unittest import mock

import pytest
from helpers.tiny_cuda import OPTIONS, write_kernel

from lorafast.runtime import cuda_compiler
from lorafast.runtime.toolchain import Failure


def compiler_of(name):
    """NVRTC or nvcc; the test is skipped where it is not installed."""
    if name == "NVRTC":
        try:
            return cuda_compiler._nvrtc()
        except Failure as why:
            pytest.skip(str(why))
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH")
    with mock.patch.object(cuda_compiler, "_nvrtc", side_effect=Failure("no NVRTC")):
        return cuda_compiler.find.__wrapped__()


@pytest.fixture(params=["NVRTC", "nvcc"])
def compiler(request):
    found = compiler_of(request.param)
    assert found.name.startswith(f"{request.param} 1")
    return found


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_120"])
def test_a_cubin_has_the_entry_that_the_options_name(compiler, architecture, tmp_path):
    source = write_kernel(tmp_path / "so ur$ces")
    made = compiler.compile(source, architecture, OPTIONS)
    assert made[:4] == b"\x7fELF"
    assert b"\0.text.tiny\0" in made
    assert b"\0.text.other\0" in compiler.compile(source, architecture, ["-DENTRY=other"])


def test_an_error_is_a_reason_with_its_file_and_line(compiler, tmp_path):
    source = write_kernel(tmp_path / "sources")
    (source.parent / "number.cuh").write_text(
        "\n__device__ constexpr int number() { return forty_two; }\n"
    )
    with pytest.raises(Failure, match=r"does not compile tiny\.cu for sm_90: .*number\.cuh") as why:
        compiler.compile(source, "sm_90", OPTIONS)
    assert "forty_two" in str(why.value)
    assert "\n" not in str(why.value)
    source.unlink()
    with pytest.raises(Failure, match=r"tiny\.cu"):
        compiler.compile(source, "sm_90", OPTIONS)


def test_an_unknown_architecture_is_a_reason(compiler, tmp_path):
    with pytest.raises(Failure, match=r"does not compile tiny\.cu for sm_1: .*(architecture|sm_1)"):
        compiler.compile(write_kernel(tmp_path / "sources"), "sm_1", OPTIONS)


def test_nvrtc_first_then_nvcc_then_a_reason(monkeypatch):
    nvrtc = cuda_compiler.Compiler("NVRTC 13.0", None)
    monkeypatch.setattr(cuda_compiler, "_nvrtc", lambda: nvrtc)
    assert cuda_compiler.find.__wrapped__() is nvrtc
    monkeypatch.setattr(cuda_compiler, "_nvrtc", mock.Mock(side_effect=Failure("no NVRTC")))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert cuda_compiler.find.__wrapped__() == "no NVRTC, and there is no nvcc on the PATH"


def test_an_old_nvrtc_does_not_serve(monkeypatch):
    def version(major, minor):
        major._obj.value, minor._obj.value = 11, 8
        return 0

    monkeypatch.setattr(cuda_compiler, "_library", lambda: mock.Mock(nvrtcVersion=version))
    with pytest.raises(Failure, match=r"NVRTC 11\.8 is older than 12\.0"):
        cuda_compiler._nvrtc()


def test_the_nvrtc_of_torchs_own_cuda_comes_first(tmp_path, monkeypatch):
    for folder in ("nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib"):
        (tmp_path / folder).mkdir(parents=True)
    newer, own = tmp_path / "nvidia/cu13/lib", tmp_path / "nvidia/cuda_nvrtc/lib"
    (newer / "libnvrtc.so.13").touch()
    (own / "libnvrtc.so.12").touch()
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.setattr("torch.version.cuda", "12.9")
    first, second, *names = cuda_compiler._places()
    assert (first, second) == (own / "libnvrtc.so.12", newer / "libnvrtc.so.13")
    assert [path.name for path in names] == ["libnvrtc.so.12", "libnvrtc.so"]
    monkeypatch.setattr(ctypes, "CDLL", mock.Mock(side_effect=OSError))
    with pytest.raises(Failure, match="there is no NVRTC: install"):
        cuda_compiler._library()
