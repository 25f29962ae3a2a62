"""Compiling once a machine; without a compiler, and with one that fails, there are no kernels and a reason."""

import stat

import pytest

from rlpost.kernels import build


@pytest.fixture
def anew(monkeypatch, tmp_path):
    """An empty cache folder, and nothing loaded yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(build.SWITCH, raising=False)
    build.library.cache_clear()
    yield tmp_path
    build.library.cache_clear()


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_without_a_compiler_there_is_a_reason(anew, monkeypatch):
    monkeypatch.setenv("CC", str(anew / "nowhere"))
    assert build.why_none() == "no C compiler: install one (cc), or name it in the variable CC"


def test_a_compiler_that_fails_is_quoted(anew, monkeypatch):
    monkeypatch.setenv("CC", script(anew / "cc", "echo 'error: unknown option' >&2; exit 1"))
    assert "failed: error: unknown option" in build.why_none()
    assert not list(anew.rglob("*.so"))


def test_a_file_that_is_no_library_is_refused(anew, monkeypatch):
    fake = 'while [ $# -gt 0 ]; do if [ "$1" = -o ]; then echo no > "$2"; fi; shift; done'
    monkeypatch.setenv("CC", script(anew / "cc", fake))
    assert "cannot be loaded" in build.why_none()


def test_the_switch_turns_them_off(anew, monkeypatch):
    monkeypatch.setenv(build.SWITCH, "0")
    assert build.why_none() == "RLPOST_KERNELS is 0"


needs_compiler = pytest.mark.skipif(bool(build.why_none()), reason=f"no compiled functions here: {build.why_none()}")


@pytest.mark.slow
@needs_compiler
def test_it_is_compiled_once_and_for_every_source_anew(anew, monkeypatch, tmp_path):
    assert not build.why_none()
    (first,) = build.cache_folder().glob("*.so")
    before = first.stat().st_mtime_ns
    build.library.cache_clear()
    assert not build.why_none()
    assert first.stat().st_mtime_ns == before
    assert oct(build.cache_folder().stat().st_mode & 0o777) == "0o700"

    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-O1"))
    build.library.cache_clear()
    assert not build.why_none()
    assert len(list(build.cache_folder().glob("*.so"))) == 2


@pytest.mark.slow
@needs_compiler
def test_a_cache_folder_that_cannot_be_written_is_done_without(anew, monkeypatch):
    blocked = anew / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    build.library.cache_clear()
    assert not build.why_none()
    assert blocked.is_file()


@pytest.mark.slow
@needs_compiler
def test_a_user_without_a_home_folder_has_kernels(anew, monkeypatch):
    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(build.Path, "home", nowhere)
    assert not build.why_none()


@pytest.mark.slow
@needs_compiler
def test_the_compiler_may_have_options(anew, monkeypatch):
    monkeypatch.setenv("CC", "cc -O2")
    assert not build.why_none()
