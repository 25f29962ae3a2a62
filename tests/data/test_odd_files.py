"""Files as people have them: every kind trains the same tokens; odd ones are read right or refused in one line."""

import csv
import gzip
import io
import json
import tracemalloc
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conversations import CHATML, make
from test_file_kinds import compressed, load
from test_layouts import ASKED, PAIRS, RANKED, SFT, TALK, bot, same, user

from rlpost.data import files, hub, tables
from rlpost.data.codec import make_codec
from rlpost.data.dataset import open_dataset
from rlpost.data.fitting import Limit
from rlpost.data.params import Source
from rlpost.errors import DataError
from rlpost.run.shelf import Shelf

ANSWERS = {"prompt": "Hi", "completions": ["a", "b"], "scores": [2.0, None]}
FORMS = {
    "alpaca": (SFT, {"instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]]}),
    "messages": (SFT, {"messages": TALK}),
    "sharegpt": (SFT, {"conversations": ASKED, "system": "s"}),
    "conversations": (PAIRS, {"chosen": TALK, "rejected": [TALK[0], bot("b")]}),
    "scores": (RANKED, {**ANSWERS, "completions": ["a", "b", "c"], "scores": [2.0, None, 1.0]}),
}


@pytest.fixture(scope="module")
def chatml():
    return make_codec(make(CHATML))


def groups(path, need, codec, **source):
    options = {"need": need, "limit": Limit(1000), "seed": 0, "where": "data", "stages": None, "bind": None}
    return open_dataset({"main": Source(path=str(path), **source)}, codec, **options).all()


def as_csv(rows, separator=","):
    text = io.StringIO()
    written = csv.DictWriter(text, list(rows[0]), delimiter=separator)
    written.writeheader()
    for row in rows:
        written.writerow({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()})
    return text.getvalue().encode()


def save(path, rows):
    kind = path.name.split(".")[1]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind in ("csv", "tsv"):
        compressed(path, as_csv(rows, "\t" if kind == "tsv" else ","))
    elif kind == "json":
        compressed(path, json.dumps(rows).encode())
    else:
        compressed(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return path


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "name", ["r.ndjson", "r.json", "r.csv", "r.tsv", "r.parquet", "r.jsonl.gz", "r.csv.zst", "r.json.gz"]
)
def test_every_form_in_every_kind_of_file_trains_the_same_tokens(form, name, tmp_path, chatml):
    need, row = FORMS[form]
    wanted = groups(save(tmp_path / "r.jsonl", [row, row]), need, chatml)
    assert same(groups(save(tmp_path / name, [row, row]), need, chatml), wanted)


TURN = pa.struct([("role", pa.string()), ("content", pa.string()), ("tool_calls", pa.string())])
NAMED = pa.StructArray.from_arrays(
    [pa.array(["user", "assistant"]).dictionary_encode(), pa.array(["Hi", "Hello"], pa.large_string())],
    ["role", "content"],
)
NESTED = {
    "a list of structs": pa.array([TALK], pa.list_(TURN)),
    "a large list": pa.array([TALK], pa.large_list(TURN)),
    "a list of fixed size": pa.array([TALK], pa.list_(TURN, 2)),
    "a list of maps": pa.array([[list(turn.items()) for turn in TALK]], pa.list_(pa.map_(pa.string(), pa.string()))),
    "dictionaries of texts": pa.ListArray.from_arrays([0, 2], NAMED),
    "JSON": pa.array([json.dumps(TALK)]),
}


@pytest.mark.parametrize("kind", NESTED)
def test_nested_columns_of_parquet(kind, tmp_path, chatml):
    pq.write_table(pa.table({"messages": NESTED[kind], "n": pa.array([1])}), tmp_path / "a.parquet")
    wanted = groups(save(tmp_path / "r.jsonl", [{"messages": TALK}]), SFT, chatml)
    assert same(groups(tmp_path / "a.parquet", SFT, chatml), wanted)


def test_answers_with_scores_in_columns_of_structs(tmp_path, chatml):
    """Every struct has the keys of all of them."""
    rows = [
        {"prompt": "Hi", "completions": [{"text": "a", "score": 1.0}, {"response": "b", "score": 2.0}]},
        {
            "prompt": "Hi",
            "completions": [{"text": "a", "score": 1.0}, {"text": "b", "score": None}, {"text": "c", "score": 0.0}],
        },
    ]
    plain = [
        {"prompt": "Hi", "completions": ["a", "b"], "scores": [1, 2]},
        {"prompt": "Hi", "completions": ["a", "b", "c"], "scores": [1, None, 0]},
    ]
    wanted = groups(save(tmp_path / "r.jsonl", plain), RANKED, chatml)
    assert same(groups(save(tmp_path / "r.parquet", rows), RANKED, chatml), wanted)


README = """\
---
configs:
- config_name: talks
  data_files:
  - {split: train, path: data/train-*}
  - {split: test, path: data/test-*}
- config_name: plain
  data_files: plain/*.parquet
---
"""


@pytest.fixture
def hub_folder(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "hub"
    (folder / "data").mkdir(parents=True)
    (folder / "plain").mkdir()
    for i, text in enumerate(("Hi", "Ho")):
        save(folder / f"data/train-0000{i}-of-00002.parquet", [{"messages": [user(text), TALK[1]]}])
    save(folder / "data/test-00000-of-00001.parquet", [{"messages": TALK}])
    save(folder / "plain/a.parquet", [{"prompt": "Hi", "completion": "Hello"}])
    return folder


def test_a_hub_folder_has_splits_and_configurations(hub_folder, tmp_path, chatml):
    lines = [{"messages": [user(text), TALK[1]]} for text in ("Hi", "Ho")]
    train, test = (groups(save(tmp_path / "r.jsonl", rows), SFT, chatml) for rows in (lines, lines[:1]))
    (hub_folder / "README.md").write_text(README)
    assert same(groups(hub_folder, SFT, chatml, config="talks"), train)
    assert same(groups(hub_folder, SFT, chatml, config="talks", split="test"), test)
    assert len(groups(hub_folder, SFT, chatml, config="plain")) == 1
    for more, reason in (
        ({}, "pick one among the available configs: ['talks', 'plain']"),
        ({"config": "x"}, "'x' not found. Available: ['talks', 'plain']"),
        ({"config": "talks", "split": "dev"}, "Should be one of ['train', 'test']"),
    ):
        with pytest.raises(DataError) as caught:
            groups(hub_folder, SFT, chatml, **more)
        assert reason in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_rows_are_read_a_few_at_a_time(kind, hub_folder, tmp_path, monkeypatch):
    """A chunk is made of a few rows, whatever the file has; the next is read when it is asked for."""
    from rlpost.data.sources import open_source

    monkeypatch.setattr(files, "AT_ONCE", 10)
    monkeypatch.setattr(hub, "AT_ONCE", 10)
    rows = [{"prompt": str(i), "completion": "x"} for i in range(1000)]
    path = save(tmp_path / "a.parquet", rows)
    if kind == "folder":
        path = hub_folder / "plain"
        save(path / "a.parquet", rows)
    reading = open_source(Source(path=str(path)), stages=None, where="data.main", bind=None)
    made = []
    plain = files.without_nulls
    for module in (files, hub):
        monkeypatch.setattr(module, "without_nulls", lambda value: made.append(value) or plain(value))
    chunks = reading.chunks()
    assert [row["prompt"] for row in next(chunks).rows] == [str(i) for i in range(10)]
    assert len(made) == 20  # two columns of ten rows
    assert sum(len(chunk.rows) for chunk in chunks) == 990


def test_encoding_takes_no_more_memory_for_more_rows(tmp_path, chatml, monkeypatch):
    """Rows go to the shelf's files as they are read."""
    monkeypatch.setattr(tables, "AT_ONCE", 100)
    peaks = []
    for count in (500, 2000):
        rows = [{"prompt": f"{i:0200}", "completion": "x"} for i in range(count)]
        path = save(tmp_path / f"{count}.csv", rows)
        run = tmp_path / str(count)
        run.mkdir()
        options = {"need": SFT, "limit": Limit(1000), "seed": 0, "where": "data", "stages": None, "bind": None}
        tracemalloc.start()
        found = open_dataset({"main": Source(path=str(path))}, chatml, shelf=Shelf(run), **options)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(found) == count
    assert peaks[1] < 1.3 * peaks[0]


LINE = b'{"prompt": "a", "completion": "b"}\n'
zipped = partial(gzip.compress, mtime=0)  # no time in the names of tests: two workers must agree on them
ODD = [
    ("a.jsonl.gz", zipped(zipped(LINE)), "it holds gzip data inside, not UTF-8"),
    ("a.jsonl", zipped(LINE), "it holds gzip data, not UTF-8"),
    ("a.csv", b"PK\x03\x04", "it holds a zip file, not UTF-8"),
    ("a.jsonl", LINE.decode().encode("utf-16"), "it holds UTF-16 text, not UTF-8"),
    ("a.json", b"PAR1", "it holds a parquet file, not UTF-8"),
    ("a.parquet", LINE, "not a readable parquet file"),
    ("a.jsonl.gz", zipped(LINE) + b"more", "not readable gzip data"),
    ("a.jsonl", b'{"prompt": "a", "prompt": "b", "completion": "c"}\n', "has the column 'prompt' more than once"),
    ("a.jsonl", LINE.replace(b"a", b"a\0"), ":1: not JSON"),
    ("a.jsonl", LINE + b"\0" * 9, ":2: not JSON"),
    ("a.csv", b"prompt,completion\na\0,b\n", ":2: a NUL byte"),
    ("a.csv", b"prompt,completion\n", "has no rows"),
    ("a.csv", b"prompt,completion\n,\n", ":2): 'completion' is empty"),
    ("a.csv", b"prompt,completion\nx\n", ":2: 1 cells, but the header has 2"),
    ("a.csv.gz", zipped(b""), "has no rows"),
    ("a.jsonl", b'{"prompt": NaN, "completion": "b"}\n', ":1): 'prompt' is float (nan), not text"),
    ("a.jsonl", LINE + b'{"prompt": 3, "completion": "b"}\n', ":2): 'prompt' is int (3), not text"),
    ("a.jsonl", LINE + b'{"prompt": "a"}\n', ":2) has no 'completion'"),
    ("a.jsonl", LINE + b'{"prompt": "a", "completion": null}\n', ":2): 'completion' is null"),
    ("a.json", b'{"data": [{"prompt": "a"}]}', "has the columns data"),
    ("a.json", b'{"prompt": ["a"], "completion": ["b"]}', "has no role"),
    ("a.json", json.dumps(json.loads(LINE), indent=2).encode(), ":1: not JSON"),
    ("a.jsonl", b'[{"prompt": "a", "completion": "b"}]\n', ":1: a row must be an object"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "data", "reason"), ODD)
def test_odd_files_are_refused_in_one_line(name, data, reason, tmp_path, chatml):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError) as caught:
        groups(tmp_path / name, SFT, chatml)
    assert reason in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_odd_tables_are_refused_in_one_line(tmp_path):
    twice = pa.table([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"])
    none = pa.table({"prompt": pa.array([], pa.string())})
    keys = pa.table({"prompt": pa.array([[("a", "b"), ("a", "c")]], pa.map_(pa.string(), pa.string()))})
    for table, reason in ((twice, "more than once"), (none, "has no rows"), (keys, "has a key twice")):
        pq.write_table(table, tmp_path / "a.parquet")
        with pytest.raises(DataError, match=reason):
            load(tmp_path / "a.parquet")


def test_links_and_folders_that_hold_nothing(tmp_path, hub_folder):
    (tmp_path / "a.jsonl").symlink_to("a.jsonl")
    with pytest.raises(DataError, match="is a link to what does not exist"):
        load(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").mkdir()
    with pytest.raises(DataError, match="doesn't contain any data files"):
        load(tmp_path / "b.jsonl")


RIGHT = [
    ("a.csv", b"\xef\xbb\xbfprompt,completion\r\na,b\r\n"),
    ("a.csv", b'prompt,completion\r"a","b"\r'),
    ("a.jsonl", b"\xef\xbb\xbf\r\n" + LINE.replace(b"\n", b"\r\n")),
    ("a.jsonl", LINE.strip()),
    ("a.jsonl.gz", zipped(b"") + zipped(LINE)),
    ("a.JSONL", LINE),
    ("a.json", b"  \n[" + LINE.strip() + b"]\n\n"),
]


@pytest.mark.parametrize(("name", "data"), RIGHT)
def test_harmless_oddities_are_read(name, data, tmp_path):
    (tmp_path / name).write_bytes(data)
    assert load(tmp_path / name).rows == [{"prompt": "a", "completion": "b"}]
