"""A kind of stage from a user's file: its keys have ranges and rules, it trains, and goes on to the same bits."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import yaml
from tiny_recipes import SFT, prepared, run, sha256, write

from rlpost.errors import Interrupted, RecipeError
from rlpost.pipeline import dry_run, train
from rlpost.recipe.resolve import resolve
from rlpost.run.lookup import find_checkpoint
from rlpost.train.loop import Loop

MINE = '''\
"""Likelihood of short answers alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from rlpost.data.params import DataRole
from rlpost.recipe.specs.common import Training

if TYPE_CHECKING:
    from rlpost.stages.context import Context


class Short(Training):
    """Learns from rows of at most `most` tokens."""

    batch_size: int = Field(8, ge=2)
    most: int | None = Field(None, gt=0)
    """Tokens of the longest completion that is learned from."""
    gain: float = 1.0

    def rows(self):
        return DataRole.completions

    def rules(self, where, earlier):
        yield from super().rules(where, earlier)
        if self.most is None and self.gain != 1:
            yield f"{where}.gain: is for short rows - give {where}.most"


def short(context: Context, cfg: Short) -> Path:
    from rlpost.train.experience import Experience

    policy = context.policy()
    data = context.data(policy, cfg.data, cfg.rows(), cfg.max_length, cfg.too_long)
    learner = context.learner(policy, cfg, updates=cfg.steps)
    loop = context.loop(cfg, {"data": data}, cfg.steps, policy=learner)

    def loss(scores, part):
        return -cfg.gain * (scores.logp_N * part["weight"]).sum(), {"nll": -scores.logp_N.detach()}

    for step in loop.steps():
        groups = [g for g in data.next(cfg.batch_size) if cfg.most is None or len(g.completions[0].ids) <= cfg.most]
        update = Experience(tuple(groups))
        update = update.with_actions(weight=update.rows.spread(1 / update.rows.lengths_S / len(groups)))
        loop.log(step, learner.update(loss, update))
    return context.finish(policy, cfg.kind, cfg.steps)
'''
STAGE = {**SFT, "kind": "mine.py:short", "most": 3, "steps": 6, "checkpoint_every": 2}
STAGES = {"short": STAGE, "last": {**SFT, "steps": 1}}


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "mine.py"
    file.write_text(MINE, "utf-8")
    return file


def refusal(folder: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        prepared(folder, STAGES, *overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_it_trains_and_goes_on_where_it_stopped_to_the_same_bits(mine: Path, tmp_path: Path, monkeypatch) -> None:
    run(tmp_path, STAGES, run="through")
    through = find_checkpoint(tmp_path / "runs/through/short")
    log = Loop.log

    def stopping(self: Loop, step: int, *rest, **more) -> None:
        log(self, step, *rest, **more)
        if step == 2:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Loop, "log", stopping)
    with pytest.raises(Interrupted):
        run(tmp_path, STAGES, run="stopped")
    monkeypatch.setattr(Loop, "log", log)
    # What lies in the run replays it, from anywhere.
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    train(resolve(str(tmp_path / "runs/stopped/config.resolved.yaml")))
    stopped = find_checkpoint(tmp_path / "runs/stopped/short")
    assert through is not None
    assert stopped is not None
    (weights,) = through.glob("*.safetensors")
    assert sha256(stopped / weights.name) == sha256(weights)


def test_its_code_is_known_to_the_run_and_its_keys_to_the_plan(mine: Path, tmp_path: Path) -> None:
    resolved = prepared(tmp_path, STAGES)
    assert yaml.safe_load(resolved.to_yaml())["stages"]["short"]["kind"] == f"{mine}:short"
    assert resolved.config.stages["short"].gain == 1.0
    lines = dry_run(resolved)
    assert f"stages.short.kind: short from {mine} (sha256 {sha256(mine)[:12]})" in lines
    assert any(line.startswith(f"  short: {mine}:short 6 steps") for line in lines)
    train(resolved)
    mine.write_text(MINE + "\n# another\n", "utf-8")
    with pytest.raises(RecipeError, match=r"code of .*mine\.py:short: sha256 .*; pass --allow-change"):
        run(tmp_path, STAGES)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.short.batch_size=1", "stages.short.batch_size: expected at least 2, got 1"),
        ("stages.short.most=0", "stages.short.most: expected more than 0, got 0"),
        ("stages.short.gain=nan", "stages.short.gain: expected a finite number"),
        ("stages.short={gain: 2, most: null}", "stages.short.gain: is for short rows - give stages.short.most"),
        ("stages.short.mots=2", "stages.short.mots: unknown key - did you mean 'stages.short.most'?"),
        ("stages.short.steps=null", "exactly one of stages.short.steps and stages.short.epochs"),
        ("stages.short.most=many", "stages.short.most: expected a whole number, got 'many'"),
        ("stages.short.kind=mine.py:shrot", "stages.short.kind: no function 'shrot' in"),
        ("stages.short.kind=mien.py:short", "stages.short.kind: no file 'mien.py' in"),
        ("stages.last.kind=/etc/x.py:f", "stages.last.kind: no file '/etc/x.py'"),
    ],
)
def test_its_keys_are_held_to_what_they_say(mine: Path, tmp_path: Path, override: str, message: str) -> None:
    assert message in refusal(tmp_path, override)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("cfg: Short)", "cfg)", "short of FILE is no stage - write `def short(context, cfg: MyStage) -> Path`"),
        ("class Short(Training)", "class Short", "short of FILE is no stage"),
        ("gain: float", "gain: Path()", "Short of FILE: Unable to generate pydantic-core schema for PosixPath"),
        ("gain: float", "gain: Number", "Short of FILE: name 'Number' is not defined - mend that key's type"),
        ("    gain", "    leaves = 'row'\n    gain", "Short.leaves: 'row' - did you mean 'rows'?"),
        (
            "from rlpost.data.params",
            "import nowhere\nfrom rlpost.data.params",
            "FILE:11: ModuleNotFoundError: No module named 'nowhere'",
        ),
    ],
)
def test_a_file_that_holds_no_stage_is_told(mine: Path, tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in MINE
    mine.write_text(MINE.replace(old, new), "utf-8")
    assert message.replace("FILE", str(mine)) in refusal(tmp_path)


def test_its_function_returns_a_result(mine: Path, tmp_path: Path) -> None:
    mine.write_text(MINE.replace("return context.finish(", "context.finish("), "utf-8")
    with pytest.raises(RecipeError, match=r"stages\.short\.kind: .*mine\.py:short returned None - return what context"):
        run(tmp_path, STAGES)


def test_a_file_outside_the_recipes_folder_is_not_loaded(mine: Path, tmp_path: Path, monkeypatch) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    monkeypatch.chdir(inside)
    mine.write_text("raise SystemExit('it ran')\n", "utf-8")
    write(inside, {"short": {**STAGE, "kind": f"{mine}:short"}})
    with pytest.raises(RecipeError, match="lies outside the recipe's folder"):
        resolve(str(inside / "tiny.yaml"))


ROWS = """\
from pathlib import Path
from pydantic import Field
from rlpost.recipe.specs.common import Stage


class Doubled(Stage):
    times: int = Field(2, ge=1)
    leaves = "rows"


def doubled(context, cfg: Doubled) -> Path:
    rows = [{"prompt": f"{n}+{n}=", "completion": str(cfg.times * n)} for n in range(4)]
    return context.finish_dataset(rows, cfg.kind)
"""


def test_it_may_leave_rows_and_the_run_is_still_its_policy(mine: Path, tmp_path: Path) -> None:
    mine.write_text(ROWS, "utf-8")
    made = {"kind": "mine.py:doubled", "data": SFT["data"], "times": 3}
    trained = {**SFT, "data": {"made": {"stage": "made"}}, "steps": 1, "batch_size": 2}
    run(tmp_path, {"made": made, "sft": trained, "again": made})
    assert (tmp_path / "runs/run/made/final/rows.jsonl").read_text("utf-8").splitlines()[1] == (
        '{"prompt": "1+1=", "completion": "3"}'
    )
    assert find_checkpoint(tmp_path / "runs/run") == tmp_path / "runs/run/sft/final"
    with pytest.raises(RecipeError, match=r"stages\.sft\.start: 'made' is of kind .*, which leaves rows and no model"):
        prepared(tmp_path, {"made": made, "sft": {**trained, "start": "made"}})
