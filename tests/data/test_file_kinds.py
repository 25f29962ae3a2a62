"""Files of every kind give the same rows; damaged ones are refused with their place."""

import gzip
import json
import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest

from rlpost.data import files, tables
from rlpost.data.params import Source
from rlpost.data.sources import open_source, read
from rlpost.errors import DataError

ROWS = [
    {"prompt": "a,\nb", "completion": 'say "x"'},
    {"prompt": "é", "completion": "d"},
]
CSV = 'prompt,completion\n"a,\nb","say ""x"""\n\né,d\n'


def load(path, **more):
    return read(Source(path=str(path), **more), stages=None, where="data.main", bind=None)


def compressed(path, data):
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(data))
    elif path.suffix == ".zst":
        with pyarrow.CompressedOutputStream(str(path), "zstd") as file:
            file.write(data)
    else:
        path.write_bytes(data)
    return path


LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
TEXTS = {
    "rows.jsonl": LINES,
    "rows.ndjson": LINES,
    "rows.json": json.dumps(ROWS, indent=2),
    "lines.json": LINES,
    "rows.csv": CSV,
    "rows.tsv": CSV.replace("prompt,", "prompt\t").replace('","', '"\t"').replace("é,", "é\t"),
}


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", TEXTS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name, ending):
    found = load(compressed(tmp_path / (name + ending), TEXTS[name].encode("utf-8-sig")))
    assert found.rows == ROWS
    by_line = {"rows.csv": [2, 5], "rows.tsv": [2, 5], "rows.json": None}.get(name, [1, 2])
    wanted = [f"{tmp_path / (name + ending)}:{n}" for n in by_line] if by_line else ["row 1", "row 2"]
    assert found.locations == wanted


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("a.csv", "a,b\n1,2\n1,2,3\n", ":3: 3 cells, but the header has 2"),
        ("a.csv", "a;b\n1;2\n", ":1: the header 'a;b' is one column: its separator may be ';'"),
        ("a.tsv", "a,b\n1,2\n", "its separator may be ','"),
        ("a.csv", "a,a\n1,2\n", "needs a name of its own"),
        ("a.csv", 'a,b\n1,"2\n', ":2: not csv"),
        ("a.csv", "a,b\n1,2\n".encode("utf-16"), "not UTF-8"),
        ("a.csv", "scores\n[1\n", ":2: 'scores' is not JSON"),
        ("a.json", "[1]", "row 1: a row must be an object"),
        ("a.json", '[{"a": 1}, {"a": }]', "row 2: not JSON"),
        ("a.json", '[{"a": 1} {"a": 1}]', "row 2: not JSON: expected ','"),
        ("a.json", '[{"a": 1}', "row 2: not JSON: expected ','"),
        ("a.json", '[{"a": 1}] []', "text after the array"),
        ("a.json", '[{"a": "\\ud83d"}]', "row 1: half a character"),
        ("a.json", '[{"a": ' + "[" * 100_000, "row 1: not usable JSON"),
        ("a.json", b'[{"a": "\xe9"}]', "not UTF-8"),
        ("a.json", '{"a": 1}\n{"a": 1\n', ":2: not JSON"),
        ("a.json", "[]", "has no rows"),
        ("a.jsonl.gz", "no gzip", "not readable gzip data"),
        ("a.jsonl.zst", "no zstd", "not readable zstd data"),
        ("a.parquet.gz", "x", "is none of .jsonl"),
        ("a.jsonl.xz", "x", "is none of .jsonl"),
    ],
)
def test_damaged_files_are_refused_in_one_line(tmp_path, name, text, reason):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError) as caught:
        load(path)
    assert reason in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_compressed_file_that_is_cut_off_is_refused(tmp_path, ending):
    path = compressed(tmp_path / f"a.jsonl{ending}", LINES.encode() * 50)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="is the file complete"):
        load(path)


def test_lists_in_csv_cells_are_json(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('prompt,completions,scores,note\n1,"[""2"", ""3""]","[1, 0]",[x]\n')
    assert load(path).rows == [{"prompt": "1", "completions": ["2", "3"], "scores": [1, 0], "note": "[x]"}]


@pytest.mark.parametrize("name", ["a.json", "a.csv", "a.jsonl.gz", "a.jsonl.zst"])
def test_a_file_is_never_in_memory_as_a_whole(tmp_path, monkeypatch, name):
    """Four times the rows take no more memory."""
    monkeypatch.setattr(files, "AT_ONCE", 100)
    monkeypatch.setattr(tables, "AT_ONCE", 100)
    monkeypatch.setattr(tables, "_READ", 1 << 12)
    peaks = []
    for count in (500, 2_000):
        rows = [{"prompt": f"{i:0200}", "completion": "x"} for i in range(count)]
        texts = {
            "a.json": json.dumps(rows),
            "a.csv": "prompt,completion\n" + "".join(f"{r['prompt']},x\n" for r in rows),
        }
        text = texts.get(name) or "".join(json.dumps(row) + "\n" for row in rows)
        path = compressed(tmp_path / name, text.encode())
        tracemalloc.start()
        reading = open_source(Source(path=str(path)), stages=None, where="data.main", bind=None)
        total = sum(len(chunk.rows) for chunk in reading.chunks())
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert total == count
    assert peaks[1] < 1.3 * peaks[0]
