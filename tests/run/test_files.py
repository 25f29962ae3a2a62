"""Files and folders written whole or not at all."""

import json
import os
import resource
from pathlib import Path

import pytest

from rlpost.errors import DiskError, ModelError
from rlpost.run.files import clear_leftovers, disk_errors, encode_line, read_json, write_atomic, write_folder_atomically
from rlpost.run.manifest import read_manifest, verify


def everything(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


class Failing:
    """Stands for os.fsync, os.rename, ...: the call of this number raises, the others are carried out."""

    def __init__(self, real, at: int, error: BaseException) -> None:
        self.real, self.at, self.error, self.calls = real, at, error, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls == self.at:
            raise self.error
        return self.real(*args, **kwargs)


FULL = "No space left on device; free some space and run the same command again"
REMOVING = ["open", "unlink", "rmdir"]
"""Calls that removing a folder needs: when one of them fails, the next resume removes it."""
CALLS = ["fsync", "rename", "replace", "mkdir", *REMOVING]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("call", CALLS)
def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch, call, error):
    folder = tmp_path / "final"
    write_folder_atomically(folder, lambda f: (f / "a").write_bytes(b"old") and None, {})
    told: set[str] = set()
    for at in range(1, 50):
        failing = Failing(getattr(os, call), at, error)
        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing)
            try:
                write_folder_atomically(folder, lambda f, at=at: (f / "a").write_bytes(b"new%d" % at) and None, {})
            except (DiskError, KeyboardInterrupt) as raised:
                told.add(str(raised))
        if call in REMOVING:
            clear_leftovers(tmp_path)
        assert everything(tmp_path) == ["final", "final/MANIFEST.json", "final/a"], (call, at)
        assert verify(folder) is None
        if failing.calls < at:
            break
    assert failing.calls < at, "every call was made to fail once"
    assert told or call in ("replace", "unlink", "rmdir")
    assert told <= ({""} if isinstance(error, KeyboardInterrupt) else {f"{folder}: {FULL}", f"{tmp_path}: {FULL}"})


@pytest.mark.parametrize("call", CALLS)
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch, call):
    path = tmp_path / "state.json"
    write_atomic(path, b"old")
    told: set[str] = set()
    for at in range(1, 20):
        failing = Failing(getattr(os, call), at, OSError(5, "Input/output error"))
        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing)
            try:
                write_atomic(path, b"new")
            except DiskError as raised:
                told.add(str(raised))
        if call in REMOVING:
            clear_leftovers(tmp_path)
        assert everything(tmp_path) == ["state.json"]
        assert path.read_bytes() in (b"old", b"new")
        if failing.calls < at:
            break
    assert failing.calls < at, "every call was made to fail once"
    assert told <= {f"{path}: Input/output error; check the disk and run the same command again"}


def test_the_same_files_are_not_written_again(tmp_path):
    folder = tmp_path / "final"
    write_folder_atomically(folder, lambda f: (f / "a").write_bytes(b"1") and None, {"when": 1})
    before = (folder / "a").stat().st_ino
    write_folder_atomically(folder, lambda f: (f / "a").write_bytes(b"1") and None, {"when": 1})
    assert (folder / "a").stat().st_ino == before
    write_folder_atomically(folder, lambda f: (f / "a").write_bytes(b"1") and None, {"when": 2})
    assert read_manifest(folder)["about"] == {"when": 2}
    write_folder_atomically(folder, lambda f: (f / "a").write_bytes(b"2") and None, {})
    assert (folder / "a").read_bytes() == b"2"


def test_a_damaged_folder_is_replaced_though_its_manifest_says_the_same(tmp_path):
    folder = tmp_path / "final"
    write_folder_atomically(folder, lambda f: (f / "a").write_bytes(b"1") and None, {})
    (folder / "a").write_bytes(b"2")
    write_folder_atomically(folder, lambda f: (f / "a").write_bytes(b"1") and None, {})
    assert (folder / "a").read_bytes() == b"1"
    assert verify(folder) is None


def test_leftovers_go_and_what_was_being_replaced_comes_back(tmp_path):
    write_folder_atomically(tmp_path / "step-000001", lambda f: (f / "a").write_bytes(b"1") and None, {})
    (tmp_path / "step-000001").rename(tmp_path / "step-000001.old.tmp-77")
    write_folder_atomically(tmp_path / "step-000002", lambda f: (f / "a").write_bytes(b"2") and None, {})
    (tmp_path / "step-000002.old.tmp-77").mkdir()
    (tmp_path / "step-000003.tmp-77" / "deep").mkdir(parents=True)
    (tmp_path / "state.json.tmp-77").write_text("half")
    clear_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000001", "step-000002"]
    assert verify(tmp_path / "step-000001") is None


def test_nothing_is_left_behind_when_descriptors_run_out(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.open(tmp_path, os.O_RDONLY)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        with pytest.raises(DiskError, match=r"Too many open files; raise the limit on open files"):
            write_folder_atomically(tmp_path / "final", lambda f: (f / "a").write_bytes(b"1") and None, {})
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert everything(tmp_path) == []


def test_errors_of_rust_libraries_are_disk_errors_when_the_system_refused():
    with (
        pytest.raises(DiskError, match=r"^runs/x: No space left on device; free some space"),
        disk_errors(Path("runs/x")),
    ):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(RuntimeError, match="vocabulary"), disk_errors(Path("runs/x")):
        raise RuntimeError("the vocabulary is empty")
    with pytest.raises(ModelError), disk_errors(Path("runs/x")):
        raise ModelError("something of ours (os error 28)")


def test_a_line_is_strict_json_whatever_is_in_it():
    line = encode_line(
        {"b": float("nan"), "a": [1.5, float("-inf")], "text": "é\u2028\n\ud800", "n": {"x": float("inf")}}
    )
    assert line == b'{"b": null, "a": [1.5, null], "text": "\xc3\xa9\xe2\x80\xa8\\n\\ud800", "n": {"x": null}}\n'
    assert json.loads(line)["text"] == "é\u2028\n\ud800"


def test_broken_json_is_one_line(tmp_path):
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(DiskError, match=r"x.json: not JSON \(.*\); restore it") as raised:
        read_json(tmp_path / "x.json")
    assert "\n" not in str(raised.value)
