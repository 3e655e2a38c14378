"""Where modules are kept: unusable caches, the temporary folder, failures that are remembered."""

import errno
import os
import stat
import tempfile
import warnings
from pathlib import Path

import pytest
from helpers.cpp_compiler import needs_compiler
from helpers.tiny_extension import compiler, dies, write_sources

from lorafast.runtime import build_cache, env, extension, fallback
from lorafast.runtime.extension import Module
from lorafast.runtime.fallback import FallbackWarning, Remediable

pytestmark = needs_compiler


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A tiny module's source, a cache of its own, no warning issued yet."""
    monkeypatch.setenv("LORAFAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LORAFAST_CXXFLAGS", "-O0")
    monkeypatch.delenv("CXX", raising=False)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(fallback, "_to_issue", [True])
    return write_sources(tmp_path / "sources")


def anew(sources):
    """As a new process would have it."""
    extension._cpu.cache_clear()
    fallback._to_issue[:] = [True]
    return extension.cpu("scalar", sources)


def said_of(capfd, word):
    return [line for line in capfd.readouterr().err.splitlines() if word in line]


PLACES = {"file": "file", "below a file": "file/cache", "nowhere": "/proc/nowhere", "full": "cache"}


@pytest.mark.parametrize("place", [*PLACES, "no home"])
def test_an_unusable_cache_is_replaced_by_a_private_folder(
    sources, tmp_path, monkeypatch, capfd, place
):
    (tmp_path / "file").touch()
    cache = str(tmp_path / PLACES[place]) if place in PLACES else "~no-such-user/cache"
    monkeypatch.setenv("LORAFAST_CACHE", cache)
    if place == "full":
        seal = build_cache.seal

        def full(path):
            if path.is_relative_to(tmp_path / "cache"):
                raise OSError(28, "No space left on device")
            seal(path)

        monkeypatch.setattr(build_cache, "seal", full)
    with pytest.warns(FallbackWarning, match="set LORAFAST_CACHE to a folder that can be") as seen:
        built = anew(sources)
    assert built.answer() == 42
    (message,) = (str(warning.message) for warning in seen)
    word = {"full": "No space left", "no home": "no home folder"}.get(place, "cannot be used")
    assert f"LORAFAST_CACHE: {cache} cannot be used" in message
    assert word in message
    folder = Path(built.__file__).parent
    assert str(folder) in message
    assert folder.parent == tmp_path / "temporary"
    assert (stat.S_IMODE(folder.stat().st_mode), folder.stat().st_uid) == (0o700, os.geteuid())
    assert said_of(capfd, "a temporary folder serves")
    assert not list(tmp_path.glob("cache/*.build-*"))
    # The next process finds it there, and nothing is left to say. That a disk is full shows only
    # once the module is written.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Path(anew(sources).__file__).parent == folder
    assert bool(said_of(capfd, "lorafast")) == (place == "full")


def test_a_module_that_is_there_is_used_where_the_cache_can_only_be_read(sources, monkeypatch):
    built = anew(sources)
    opened = Path.open

    def read_only(path, mode="r", *rest, **named):
        if path.is_relative_to(env.cache()) and set(mode) & set("wax+"):
            raise OSError(errno.EROFS, "Read-only file system")
        return opened(path, mode, *rest, **named)

    # Root may write whatever the modes say.
    monkeypatch.setattr(Path, "open", read_only)
    with pytest.raises(OSError, match="Read-only"):
        extension.build(Module.of("scalar", sources, env.cache(), env.cxxflags()), env.cxx())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert anew(sources).__file__ == built.__file__


def test_no_folder_at_all_is_a_reason(sources, tmp_path, monkeypatch):
    monkeypatch.setenv("LORAFAST_CACHE", "/proc/nowhere")
    (tmp_path / "temporary").rmdir()
    reason = anew(sources)
    assert isinstance(reason, Remediable)
    for part in ("/proc/nowhere cannot be used", "neither can a temporary folder",
                 "set LORAFAST_CACHE to a folder that can be written"):  # fmt: skip
        assert part in reason


def _link(folder, private):
    folder.symlink_to(private, target_is_directory=True)


@pytest.mark.parametrize(
    "plant",
    [
        lambda folder, _: folder.mkdir(mode=0o755),
        lambda folder, _: (folder.mkdir(), folder.chmod(0o770)),
        lambda folder, _: folder.touch(mode=0o700),
        _link,
        pytest.param(
            lambda folder, _: (folder.mkdir(mode=0o700), os.chown(folder, 65534, 65534)),
            marks=pytest.mark.skipif(os.geteuid() != 0, reason="gives a folder to another user"),
        ),
    ],
)
def test_a_folder_that_others_could_have_written_is_passed_by(sources, tmp_path, plant):
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    planted = tmp_path / "temporary" / "lorafast-kernels-0"
    plant(planted, private)
    found = build_cache.temporary_folder()
    assert found not in (planted, private)
    assert build_cache._is_private(found)
    assert build_cache.temporary_folder() == found


def test_a_folder_below_a_setgid_one_is_found_again(sources, tmp_path):
    (tmp_path / "temporary").chmod(0o2700)
    found = build_cache.temporary_folder()
    assert build_cache._is_private(found)
    assert build_cache.temporary_folder() == found


@pytest.mark.parametrize("taken", [False, True])
def test_processes_that_begin_together_share_one_folder(sources, tmp_path, monkeypatch, taken):
    # Each has looked before another made one.
    monkeypatch.setattr(Path, "glob", lambda *_: iter(()))
    first = build_cache.temporary_folder()
    if taken:
        # By another user: then a folder whose name nobody can foresee.
        first.chmod(0o755)
    assert (build_cache.temporary_folder() == first) != taken


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_folder_whose_parent_others_can_change_is_refused(sources, tmp_path, mode):
    (tmp_path / "temporary").chmod(mode)
    with pytest.raises(PermissionError, match="other users can rename what is in"):
        build_cache.temporary_folder()
    (tmp_path / "temporary").chmod(mode | stat.S_ISVTX)
    assert build_cache._is_private(build_cache.temporary_folder())


def test_a_failed_build_is_remembered_until_something_changes(
    sources, tmp_path, monkeypatch, capfd
):
    script = compiler(tmp_path, dies("echo 'cxx: error: out of luck' >&2; exit 1"))
    monkeypatch.setenv("CXX", script)
    first = anew(sources)
    assert "error: out of luck" in first
    assert len(said_of(capfd, "compiling")) == 1
    record = Module.of("scalar", sources, env.cache(), env.cxxflags()).beside(".failed")
    again = anew(sources)
    assert isinstance(again, Remediable)
    assert again == f"{first} (it failed before; to try again, delete {record})"
    assert not said_of(capfd, "compiling")
    # Deleting it tries again.
    record.unlink()
    assert anew(sources) == first
    assert len(said_of(capfd, "compiling")) == 1
    # So does another source.
    header = sources / "answer.h"
    header.write_text(header.read_text().replace("42", "43"))
    assert anew(sources) == first.replace(
        record.stem, Module.of("scalar", sources, env.cache(), env.cxxflags()).name
    )
    assert len(said_of(capfd, "compiling")) == 1
    # So does the same path with another compiler behind it; and it serves, and forgets.
    compiler(tmp_path, ":")
    assert anew(sources).answer() == 43
    assert [path.suffix for path in record.parent.iterdir()].count(".failed") == 1


def test_another_compiler_is_tried_although_one_failed(sources, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", compiler(tmp_path, dies("exit 1")))
    assert "it stops without a message" in anew(sources)
    monkeypatch.setenv("CXX", "c++")
    assert anew(sources).answer() == 42
    assert not list((tmp_path / "cache").glob("*.failed"))


def test_a_build_asked_for_by_hand_tries_again(sources, tmp_path, monkeypatch, capfd):
    script = compiler(tmp_path, dies(f"test -e {tmp_path}/mended || kill -9 $$"))
    monkeypatch.setenv("CXX", script)
    assert "Killed" in anew(sources)
    (tmp_path / "mended").touch()
    assert "Killed" in anew(sources)
    assert len(said_of(capfd, "compiling")) == 1
    module = Module.of("scalar", sources, env.cache(), env.cxxflags())
    extension.build(module, env.cxx(), retry=True)
    assert not module.beside(".failed").exists()
    assert anew(sources).answer() == 42


def test_a_record_cut_short_is_none(tmp_path):
    record = tmp_path / "record"
    for content in (b"", b"tools", b"tools\n", b"\xff\n\xfe"):
        record.write_bytes(content)
        assert build_cache.remembered_failure(record, "tools") is None
    build_cache.remember_failure(record, "tools", "no luck")
    assert build_cache.remembered_failure(record, "tools") == "no luck"
    assert build_cache.remembered_failure(record, "others") is None
