"""A run reads, maps and tokenises its rows once, before anything is trained; going on, it takes what it kept."""

from __future__ import annotations

import shutil

import pytest
from tiny_recipes import SFT, jsonl, prepared, run

from rlpost.data.codec import Codec
from rlpost.errors import DataError
from rlpost.pipeline import train
from rlpost.run.names import CACHE

MAP = """\
from pathlib import Path


def noted(row, *, log):
    with Path(log).open("a") as file:
        file.write(row["prompt"] + "\\n")
    return row
"""


def stages(folder, rows):
    (folder / "map.py").write_text(MAP, "utf-8")
    source = {
        "path": str(jsonl(folder / "rows.jsonl", rows)),
        "map": {"fn": "map.py:noted", "args": {"log": str(folder / "log")}},
    }
    first = {"path": str(jsonl(folder / "first.jsonl", ROWS))}
    sft = {**SFT, "steps": 2}
    return {"first": {**sft, "data": {"rows": first}}, "sft": {**sft, "data": {"rows": source}}}


ROWS = [{"prompt": f"{i}=", "completion": f"{i}"} for i in range(20)]


def test_going_on_reads_what_was_kept(tmp_path, monkeypatch):
    own = stages(tmp_path, ROWS)
    run(tmp_path, own)
    assert (tmp_path / "log").read_text("utf-8").split() == [row["prompt"] for row in ROWS]

    def refused(*_):
        raise AssertionError("rows are tokenised again")

    with monkeypatch.context() as patch:
        patch.setattr(Codec, "all_ids", refused)
        patch.setattr(Codec, "ids", refused)
        train(prepared(tmp_path, own, "stages.sft.steps=4"), allow_change=True)
    assert len((tmp_path / "log").read_text("utf-8").split()) == len(ROWS)
    shutil.rmtree(tmp_path / "runs/run" / CACHE)
    train(prepared(tmp_path, own, "stages.sft.steps=6"), allow_change=True)
    assert len((tmp_path / "log").read_text("utf-8").split()) == 2 * len(ROWS)


def test_a_wrong_row_of_a_later_stage_stops_the_run_before_the_first(tmp_path):
    own = stages(tmp_path, [*ROWS, {"prompt": "1=", "completion": "x"}])
    with pytest.raises(DataError, match=r"rows.jsonl:21\): the tokenizer has no token for 'x'"):
        run(tmp_path, own)
    assert not (tmp_path / "runs/run/first").exists()
