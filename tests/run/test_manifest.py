"""A folder with a manifest: every change to it is found."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from rlpost.errors import DiskError
from rlpost.run.manifest import read_manifest, verify, write_manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "step-000003"
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(range(256)))
    (folder / "state.json").write_text('{"step": 3}\n')
    (folder / "tokenizer" / "vocab.json").write_text("{}")
    write_manifest(folder, {"step": 3})
    return folder


def files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def cuts(data: bytes) -> Iterator[bytes]:
    for length in sorted({0, 1, len(data) // 2, len(data) - 1}):
        yield data[:length]


def test_a_whole_folder_has_no_fault(folder):
    assert verify(folder) is None
    manifest = read_manifest(folder)
    assert manifest["about"] == {"step": 3}
    assert manifest["files"]["tokenizer/vocab.json"] == {
        "sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
        "size": 2,
    }
    assert sorted(manifest["files"]) == ["model.safetensors", "state.json", "tokenizer/vocab.json"]


def test_every_cut_of_every_file_is_found(folder):
    for path in files(folder):
        whole = path.read_bytes()
        for data in cuts(whole):
            path.write_bytes(data)
            assert path.name in verify(folder), (path.name, len(data))
        path.write_bytes(whole + b"\n")
        assert path.name in verify(folder)
        path.write_bytes(whole)
    assert verify(folder) is None


def test_every_removed_file_is_found(folder):
    for path in files(folder):
        whole = path.read_bytes()
        path.unlink()
        assert verify(folder) == f"{path.relative_to(folder)} is missing"
        path.write_bytes(whole)
    assert verify(folder) is None


def test_a_flipped_bit_is_found_in_every_byte(folder):
    flips = 0
    for path in files(folder):
        whole = path.read_bytes()
        for position in range(len(whole)):
            data = bytearray(whole)
            data[position] ^= 1 << (position * 5 + 3) % 8
            path.write_bytes(data)
            assert verify(folder), (path.name, position)
            flips += 1
        path.write_bytes(whole)
    assert flips > 700
    assert verify(folder) is None


@pytest.mark.parametrize("text", ["", "null", "[]", "1", '"x"', "{}", '{"check": 1, "files": {}}', "\xff", "[" * 9])
def test_a_manifest_of_something_else_is_damaged(folder, text):
    (folder / "MANIFEST.json").write_bytes(text.encode("latin-1"))
    assert verify(folder) == "MANIFEST.json is damaged"


def test_a_folder_that_is_not_there_is_a_fault_too(tmp_path):
    assert verify(tmp_path / "none") == "MANIFEST.json is missing"


@pytest.mark.parametrize("name", ["README.md", ".gitattributes", "LICENSE", "notes.txt", "loss.png", "eval.json"])
def test_notes_that_people_add_do_no_harm(folder, name):
    (folder / name).write_text("a note")
    assert verify(folder) is None


def test_a_model_card_may_be_filled_in(folder):
    (folder / "README.md").write_text("# Model card\n[More Information Needed]")
    write_manifest(folder, {"step": 3})
    (folder / "README.md").write_text("# A model that adds")
    assert verify(folder) is None
    (folder / "README.md").unlink()
    assert verify(folder) is None


@pytest.mark.parametrize("name", ["adapter_config.json", "other.safetensors", "chat_template.jinja", "merges.txt"])
def test_a_file_that_a_library_would_read_is_no_note(folder, name):
    (folder / name).write_text("{}")
    assert verify(folder) == f"{name} was not written with it"


def test_a_folder_that_belongs_elsewhere(folder):
    write_manifest(folder, {"run": "a", "stage": "sft", "step": 3})
    assert verify(folder, {"run": "a", "stage": "sft", "step": 3}) is None
    assert verify(folder, {"run": None, "stage": "sft"}) is None
    assert verify(folder, {"run": "b", "stage": "sft"}) == "it is of another run"
    assert verify(folder, {"run": "a", "stage": "dpo"}) == "it is of stage sft, not dpo"
    assert verify(folder, {"run": "a", "step": 6}) == "it is of step 3, not 6"


def test_what_cannot_be_read_is_no_damage(folder, monkeypatch):
    def refuse(*_args: object) -> None:
        raise OSError(24, "Too many open files", str(folder / "state.json"))

    monkeypatch.setattr("rlpost.run.manifest.hashlib.file_digest", refuse)
    with pytest.raises(DiskError, match=r"state.json: Too many open files; make it readable, or remove"):
        verify(folder)
