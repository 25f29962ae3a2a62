"""`rlpost report`: one HTML file that loads nothing and shows all text as text."""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_recipes import GRPO, SFT, run

from rlpost.api.run import Score
from rlpost.cli.app import main
from rlpost.report.chart import label, line_chart, thinned, ticks
from rlpost.report.page import not_finite, scores_side_by_side

EVIL = "<script>alert('x')</script>&\"'"
EVALUATION = {
    "data": {"held_out": {"task": {"fn": "addition.held_out"}, "limit": 8}},
    "rewards": [{"fn": "rewards.py:cut_off"}],
    "sampling": {"max_new_tokens": 4},
}


class Page(HTMLParser):
    """The tags, addresses and text of a page; fails where tags do not close in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        assert not {name for name, _ in attrs} & {"src", "href", "onload", "onclick"}
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, _attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def command(monkeypatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["rlpost", "report", *words])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def test_a_run_as_it_grows(tmp_path: Path, monkeypatch, capsys) -> None:
    stages = {"sft": {**SFT, "steps": 2}, "grpo": {**GRPO, "steps": 2}}
    trained = run(tmp_path, stages, evaluation={**EVALUATION, "every": 1}, description=EVIL).parents[1]
    answers = trained / "evaluation/grpo.jsonl"
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    answers.write_text("".join(json.dumps({**row, "completion": EVIL}) + "\n" for row in rows))
    out = tmp_path / "out.html"
    capsys.readouterr()
    assert command(monkeypatch, str(trained), "--out", str(out)) == 0
    assert capsys.readouterr().out.strip() == str(out)
    html = out.read_text()
    page = Page(html)
    assert "script" not in page.tags
    assert page.text.count(EVIL) == 7  # the description, and six answers
    assert "http" not in re.sub("http-equiv", "", html)
    logged = {key for stage in stages for line in open(trained / stage / "metrics.jsonl") for key in json.loads(line)}  # noqa: SIM115, PTH123
    assert page.tags.count("polyline") >= len(logged - {"step"})
    for said in (
        "base and grpo",
        "stages.sft.learning_rate",
        "0.02",
        "95 % interval",
        "torch",
        "finished",
        "eval/greedy/accuracy",
    ):
        assert said in page.text
    # Without an evaluation, unfinished, then with nothing logged.
    for file in (trained / "evaluation").iterdir():
        file.unlink()
    (trained / "grpo/DONE").unlink()
    assert command(monkeypatch, str(trained), str(trained)) == 0
    page = Page((trained / "report.html").read_text())
    assert "no stage has been evaluated" in page.text
    assert "unfinished" in page.text
    for stage in stages:
        (trained / stage / "metrics.jsonl").unlink()
        (trained / stage / "evaluations.jsonl").unlink()
    assert command(monkeypatch, str(trained)) == 0
    assert "No step has been logged yet" in Page((trained / "report.html").read_text()).text
    # Damage is one line.
    capsys.readouterr()
    (trained / "sft/metrics.jsonl").write_text("{]\n")
    assert command(monkeypatch, str(trained)) == 5
    (trained / "sft/metrics.jsonl").unlink()
    (trained / "evaluation/base.json").write_text('{"greedy": {}}')
    assert command(monkeypatch, str(trained)) == 5
    (trained / "run.json").write_text("{}")
    assert command(monkeypatch, str(trained)) == 5
    assert command(monkeypatch, str(tmp_path / "absent")) == 4
    assert command(monkeypatch, *[str(trained)] * 7) == 2
    assert len(capsys.readouterr().err.splitlines()) == 5


def test_values_that_are_not_finite_are_told_of() -> None:
    nan = float("nan")
    lines = [("a", [(1, nan), (3, 0.5)]), ("b", [(2, 1.0)]), ("c", [(5, nan), (4, float("inf"))])]
    assert not_finite(lines) == "not finite: in a: 1 value, from step 1; in c: 2 values, from step 4"
    assert not_finite([("", [(7, nan)])]) == "not finite: 1 value, from step 7"
    assert not_finite([("", [(7, 0.0)])]) == ""


def test_scores_of_runs_stand_side_by_side() -> None:
    def of(*cells: tuple[str, str]) -> SimpleNamespace:
        return SimpleNamespace(scores=[Score(stage, mode, "all", 0.5, 0.4, 0.6, 9, 1) for stage, mode in cells])

    first = of(("base", "greedy"), ("base", "sampled"), ("sft", "greedy"), ("sft", "sampled"))
    rows = scores_side_by_side([first, of(("base", "greedy"), ("sft", "sampled"), ("dpo", "greedy"))])
    assert [(s.stage, s.mode, i) for i, _, s in rows] == [
        *[("base", "greedy", 0), ("base", "greedy", 1), ("base", "sampled", 0), ("sft", "greedy", 0)],
        *[("sft", "sampled", 0), ("sft", "sampled", 1), ("dpo", "greedy", 1)],
    ]


def test_charts() -> None:
    assert ">loss</text>" in line_chart({"a": [(1, 2.0)]}, "loss")
    assert line_chart({"a": []}, "loss") == ""
    assert line_chart({"a": [(1, float("nan"))]}, "loss") == ""
    assert "circle" in line_chart({"a": [(1, 2.0)]}, "loss")
    assert "&lt;b&gt;" in line_chart({"a": [(1, 2.0), (2, 2.0)]}, "<b>")
    assert ticks(0, 1) == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert ticks(3, 97)[0] <= 3
    assert ticks(3, 97)[-1] >= 97
    assert [label(x, x or 1) for x in (0, 1e-5, 0.25, 1500, 2e6)] == ["0", "1e-5", "0.25", "1500", "2e6"]
    for low, high in ((0.99998, 1.00002), (200_000, 200_004), (-2e-6, 2.25e-6)):
        marks = ticks(low, high)
        told = [label(x, marks[1] - marks[0]) for x in marks]
        assert [float(text) for text in told] == pytest.approx(marks, abs=1e-3 * (marks[1] - marks[0]))
    many = thinned([(float(i), float(i)) for i in range(1000)])
    assert len(many) <= 240
    assert many[0] == (2.0, 2.0)
