"""Encoded rows are kept in the run: read again where they are whole and its own, else made again."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from pathlib import Path

import pytest

from rlpost.data import files
from rlpost.data.codec import Codec, make_codec
from rlpost.data.dataset import open_dataset
from rlpost.data.fitting import Limit
from rlpost.data.formats import DataRole
from rlpost.data.params import Source
from rlpost.data.params import Tokenizer as Spec
from rlpost.data.tokenizers import make_tokenizer
from rlpost.errors import DataError
from rlpost.run.names import CACHE
from rlpost.run.record import Record, write_record
from rlpost.run.shelf import Shelf


@pytest.fixture(scope="module")
def codec() -> Codec:
    return make_codec(make_tokenizer(Spec(alphabet="0123456789+=")))


def write_rows(folder: Path, count: int, more: str = "") -> Path:
    rows = [{"prompt": f"{i}+{i}=", "completion": f"{2 * i}{more}"} for i in range(count)]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def new_run(folder: Path) -> Path:
    folder.mkdir()
    write_record(folder, Record("", {}))
    return folder


def opened(rows: Path, codec: Codec, run: Path | None, **options):
    shelf = None if run is None else Shelf(run)
    about = {"need": DataRole.completions, "limit": Limit(options.pop("longest", 64)), "seed": 0, "where": "data"}
    sources = {"c": Source(path=str(rows), **options)}
    return open_dataset(sources, codec, **about, stages=lambda name: Path(name), bind=None, shelf=shelf)


def digests(data):
    return [group.digest() for group in data.all()]


@pytest.fixture
def encodings(monkeypatch):
    """How often texts were tokenised together."""
    calls = []
    tokenise = Codec.all_ids

    def counted(self, texts):
        calls.append(len(texts))
        return tokenise(self, texts)

    monkeypatch.setattr(Codec, "all_ids", counted)
    return calls


def test_rows_are_tokenised_once(tmp_path, codec, encodings):
    rows, run = write_rows(tmp_path, 50), new_run(tmp_path / "run")
    first = opened(rows, codec, run)
    assert encodings
    encodings.clear()
    again = opened(rows, codec, run)
    assert not encodings
    assert digests(again) == digests(first) == digests(opened(rows, codec, None))
    assert (again.notices, again.fingerprint) == (first.notices, first.fingerprint)


@pytest.mark.parametrize("name", ["ids.int32", "rows.uint8", "about.json", "MANIFEST.json"])
@pytest.mark.parametrize("harm", ["byte", "cut", "gone"])
def test_what_is_damaged_is_made_again(tmp_path, codec, encodings, capsys, name, harm):
    rows, run = write_rows(tmp_path, 50), new_run(tmp_path / "run")
    wanted = digests(opened(rows, codec, run))
    (file,) = (run / CACHE).glob(f"*/{name}")
    data = file.read_bytes()
    if harm == "gone":
        file.unlink()
    else:
        file.write_bytes(bytes([data[0] ^ 1]) + data[1:] if harm == "byte" else data[:-1])
    encodings.clear()
    assert digests(opened(rows, codec, run)) == wanted
    assert encodings
    assert "its rows are encoded again" in capsys.readouterr().err


def test_what_is_another_runs_is_made_again(tmp_path, codec, encodings, capsys):
    rows, one, other = write_rows(tmp_path, 50), new_run(tmp_path / "one"), new_run(tmp_path / "other")
    wanted = digests(opened(rows, codec, one))
    shutil.copytree(one / CACHE, other / CACHE)
    encodings.clear()
    assert digests(opened(rows, codec, other)) == wanted
    assert encodings
    assert "it is of another run; its rows are encoded again" in capsys.readouterr().err


@pytest.mark.parametrize("options", [{"longest": 63}, {"limit": 49}, {"columns": {"completion": "prompt"}}])
def test_other_settings_have_other_rows(tmp_path, codec, encodings, options):
    rows, run = write_rows(tmp_path, 50), new_run(tmp_path / "run")
    opened(rows, codec, run)
    encodings.clear()
    assert digests(opened(rows, codec, run, **options)) == digests(opened(rows, codec, None, **options))
    assert len(list((run / CACHE).iterdir())) == 1  # the ones before were the same source's


def test_another_tokenizer_has_other_rows(tmp_path, codec):
    rows, run = write_rows(tmp_path, 50), new_run(tmp_path / "run")
    first = digests(opened(rows, codec, run))
    other = make_codec(make_tokenizer(Spec(alphabet="9876543210+=")))
    assert digests(opened(rows, other, run)) == digests(opened(rows, other, None)) != first


def test_changed_rows_are_noticed(tmp_path, codec):
    rows, run = write_rows(tmp_path, 50), new_run(tmp_path / "run")
    state = opened(rows, codec, run).state()
    opened(rows, codec, run).load(state)
    write_rows(tmp_path, 50, more="1")
    with pytest.raises(DataError, match="the data has changed since this run began"):
        opened(rows, codec, run).load(state)


def test_rows_that_are_refused_leave_nothing(tmp_path, codec):
    rows, run = write_rows(tmp_path, 50, more="x"), new_run(tmp_path / "run")
    for _ in range(2):
        with pytest.raises(DataError, match=r"rows.jsonl:1\): the tokenizer has no token for 'x'"):
            opened(rows, codec, run)
    assert not list((run / CACHE).iterdir())


def test_memory_does_not_grow_with_the_rows(tmp_path, codec, monkeypatch):
    """What stays in memory is next to nothing beside a folder, and a few bytes a token without one."""
    monkeypatch.setattr(files, "AT_ONCE", 500)
    kept, most = {}, {}
    for count in (3_000, 9_000):
        (folder := tmp_path / str(count)).mkdir()
        rows, run = write_rows(folder, count), new_run(folder / "run")
        for way in ("folder", "again", "memory"):
            tracemalloc.start()
            data = opened(rows, codec, None if way == "memory" else run)
            kept[way], most[way, count] = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert len(data) == count
    tokens = sum(len(g.prompt) + len(g.completions[0].ids) for g in data.every())
    assert max(kept["folder"], kept["again"]) < tokens
    assert kept["memory"] < 8 * tokens + 1.5 * rows.stat().st_size
    assert most["folder", 9_000] < 1.3 * most["folder", 3_000]
    assert most["again", 9_000] < most["folder", 9_000]
