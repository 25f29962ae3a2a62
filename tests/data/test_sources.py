import json
import random
from pathlib import Path

import pytest

from rlpost.data.params import KFold, KFoldPart, Source
from rlpost.data.sources import open_source, read
from rlpost.errors import DataError, RecipeError
from rlpost.usercode.bound import Bound
from rlpost.usercode.params import TimedFunction

ROWS = [{"question": f"q{i // 2}", "answer": i} for i in range(20)]


def no_stage(name):
    raise AssertionError(name)


def fake_bind(**functions):
    def bind(function, field, where, base):
        return functions[function.fn]

    return bind


def load(source, bind=None, stages=no_stage, **more):
    return read(source, stages=stages, where="stages.sft.data.main", bind=bind or fake_bind(), **more).rows


def refused(source, error=DataError, **more):
    with pytest.raises(error) as caught:
        load(source, **more)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_jsonl_is_read_with_bom_blank_lines_and_line_separators_inside_strings(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"text": "a\u2028b"}\r\n\n{"text": "é"}'.encode())
    assert load(Source(path=str(path))) == [{"text": "a\u2028b"}, {"text": "é"}]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "b"', "not JSON"),
        (b'["b"]', "this is a list"),
        (b"3", "this is a number"),
        (b"null", "this is null"),
        ("{'text': 'é'}".encode("latin-1"), "not UTF-8 (byte 0xe9 at column 11)"),
        (b'{"text": "\\ud83d"}', "lone surrogate"),
        (b"[" * 100_000, "not usable JSON"),
        (b'{"n": ' + b"1" * 5000 + b"}", "not usable JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, reason):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n' + line + b"\n")
    message = refused(Source(path=str(path)))
    assert message.startswith(f"{path}:3: ")
    assert reason in message


def test_parquet_rows_equal_those_written(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"prompt": "a", "n": 1}, {"prompt": "b", "n": 2}]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert load(Source(path=str(path))) == rows
    path.write_bytes(b"PAR1 and no more")
    assert str(path) in refused(Source(path=str(path)))


def test_a_folder_in_hub_format_gives_the_split(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    (folder / "test.jsonl").write_text('{"text": "c"}\n')
    assert load(Source(path=str(folder), split="test")) == [{"text": "c"}]
    assert 'Unknown split "dev"' in refused(Source(path=str(folder), split="dev"))


def test_a_hub_name_out_of_reach_is_one_line(monkeypatch):
    import datasets

    def unreachable(name, config, split):
        raise ConnectionError(f"Couldn't reach {name!r}\non the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    message = refused(Source(path="nobody/nothing"))
    assert "stages.sft.data.main.path: cannot load nobody/nothing" in message
    assert "network" in message


def test_a_missing_file_is_not_asked_of_the_hub(write, tmp_path):
    write(ROWS, "train.jsonl")
    assert "did you mean 'train.jsonl'" in refused(Source(path=str(tmp_path / "tran.jsonl")))
    assert "does not exist" in refused(Source(path="nowhere.jsonl"))
    assert "does not exist" in refused(Source(path="./nowhere"))
    (tmp_path / "a.xlsx").write_text("a,b")
    assert "is none of .jsonl" in refused(Source(path=str(tmp_path / "a.xlsx")))


def test_a_path_may_be_relative_to_the_recipe(write, tmp_path):
    write([{"text": "a"}])
    assert load(Source(path="rows.jsonl"), base=tmp_path) == [{"text": "a"}]


def test_an_earlier_stage_and_a_task(write):
    path = write([{"text": "a"}])
    assert load(Source(stage="pairs"), stages={"pairs": path}.__getitem__) == [{"text": "a"}]
    bind = fake_bind(make=lambda: [{"n": 1}, {"n": 2}], broken=lambda: 3)
    assert load(Source(task=TimedFunction(fn="make")), bind) == [{"n": 1}, {"n": 2}]
    assert "broken returned int" in refused(Source(task=TimedFunction(fn="broken")), bind=bind)


def test_the_rows_of_rlposts_own_tasks_are_digested_once_and_those_of_users_whenever_they_are_asked_for():
    made = []

    def make(n):
        made.append(n)
        return [{"prompt": str(len(made) if n < 0 else i)} for i in range(abs(n))]

    def identity(n, file=None):
        source = Source(task=TimedFunction(fn=f"counted.{n}"))
        bound = Bound(lambda: make(n), "counted", file=file)
        return open_source(source, stages=no_stage, where="a", bind=lambda *_: bound, base=Path()).identity()

    assert identity(3) == identity(3) != identity(4)
    assert made == [3, 4]
    assert identity(-1, Path("own.py")) != identity(-1, Path("own.py"))


def test_exactly_one_origin():
    assert "exactly one of path, stage, task (given: none)" in refused(Source(), RecipeError)
    assert "path and stage" in refused(Source(path="a", stage="b"), RecipeError)


def test_an_empty_file_is_refused(write):
    assert "has no rows" in refused(Source(path=str(write([]))))


def folded(path, **fold):
    return load(Source(path=str(path), kfold=KFold(by="question", **fold)))


def test_a_fold_parts_the_questions_and_keeps_their_rows_together(write):
    path = write(ROWS)
    train, held_out = (folded(path, of=5, hold_out=2, part=part) for part in KFoldPart)
    assert sorted(r["answer"] for r in train + held_out) == list(range(20))
    assert {r["question"] for r in train}.isdisjoint({r["question"] for r in held_out})
    assert len(held_out) == 4  # 10 questions in 5 parts: 2 questions of 2 rows
    parts = [{r["question"] for r in folded(path, of=5, hold_out=i, part=KFoldPart.held_out)} for i in range(5)]
    assert sorted(q for part in parts for q in part) == [f"q{i}" for i in range(10)]


def test_a_fold_does_not_depend_on_the_order_of_rows(write):
    held_out = folded(write(ROWS), part=KFoldPart.held_out)
    shuffled = random.Random(1).sample(ROWS, len(ROWS))
    again = folded(write(shuffled, "b.jsonl"), part=KFoldPart.held_out)
    assert sorted(map(str, again)) == sorted(map(str, held_out))
    assert held_out != folded(write(ROWS), hold_out=1, part=KFoldPart.held_out)


def test_fold_errors(write):
    path = str(write(ROWS))
    wrong = refused(Source(path=path, kfold=KFold(by="qestion")))
    assert f"stages.sft.data.main.kfold.by: {path}:1 has no 'qestion'" in wrong
    assert "did you mean 'question'" in wrong
    assert "hold_out=5 of=5" in refused(Source(path=path, kfold=KFold(by="answer", hold_out=5)), RecipeError)


def test_map_makes_one_many_or_no_rows(write):
    def grow(row):
        row["seen"] = True  # the row is the map's own
        return {0: None, 1: row, 2: [row, {"answer": -2}]}[row["answer"] % 3]

    rows = load(Source(path=str(write(ROWS[:3])), map=TimedFunction(fn="grow")), fake_bind(grow=grow))
    assert [r["answer"] for r in rows] == [1, 2, -2]


def test_map_errors_name_function_and_row(write):
    path = str(write(ROWS[:3]))
    bind = fake_bind(fails=lambda row: row["x"], text=lambda row: row["question"], none=lambda row: row.clear())

    def message(name):
        return refused(Source(path=path, map=TimedFunction(fn=name)), bind=bind)

    assert message("fails") == f"stages.sft.data.main.map: fails: {path}:1 failed with KeyError: 'x'"
    assert f"text: {path}:1 returned str" in message("text")
    assert "none left no row of 3" in message("none")


def test_columns_are_named_or_filled_in(write):
    columns = {"prompt": "Q{{}}: {question} ({answer})", "completion": "question"}
    rows = load(Source(path=str(write(ROWS[:1])), columns=columns))
    assert rows == [{"question": "q0", "answer": 0, "prompt": "Q{}: q0 (0)", "completion": "q0"}]


def test_roles_may_swap_columns(write):
    rows = load(Source(path=str(write([{"a": "1", "b": "2"}])), columns={"a": "b", "b": "a"}))
    assert rows == [{"a": "2", "b": "1"}]


@pytest.mark.parametrize(
    "template",
    ["{question.__class__}", "{question[0]}", "{question!r}", "{answer:>9}", "{}", "{question", "}"],
)
def test_a_template_does_nothing_but_name_columns(write, template):
    message = refused(Source(path=str(write(ROWS)), columns={"prompt": template}), RecipeError)
    assert "stages.sft.data.main.columns.prompt" in message


def test_a_missing_column_names_those_that_exist(write):
    rows = [{"question": "a"}, {"questions": "b"}]
    message = refused(Source(path=str(write(rows)), columns={"prompt": "question"}))
    assert "rows.jsonl:2 has no 'question' (columns: questions)" in message
    null = refused(Source(path=str(write([{"a": None}])), columns={"prompt": "{a}"}))
    assert "column 'a' is neither text nor a number" in null


def test_read_fold_map_columns_limit_in_that_order(write):
    seen = []

    def keep(row):
        seen.append(row["question"])
        return {"made": row["question"]} if row["answer"] % 2 else None

    source = Source(
        path=str(write(ROWS)),
        kfold=KFold(by="question", of=2),
        map=TimedFunction(fn="keep"),
        columns={"prompt": "made"},
        limit=2,
    )
    rows = load(source, fake_bind(keep=keep))
    assert len(seen) == 10
    assert [json.dumps(r) for r in rows] == [json.dumps({"made": q, "prompt": q}) for q in (seen[0], seen[2])]
