"""`rlpost.Run`: what a run has left on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlpost.errors import DiskError, ModelError
from rlpost.run import names
from rlpost.run.files import disk_errors
from rlpost.run.lookup import find_checkpoint, read_config
from rlpost.run.record import read_record
from rlpost.run.stage import StageDirectory
from rlpost.suggest import hint_or_list

if TYPE_CHECKING:
    from rlpost.api.generation import Generator


@dataclass(frozen=True)
class Score:
    """A cell of the evaluation table: the share of right answers (or mean reward) after a stage, with its interval."""

    stage: str
    """`base` is the model before the first stage."""
    mode: str
    """`greedy` or `sampled`."""
    part: str
    """`all` prompts, or a slice that the recipe names."""
    value: float
    low: float
    """Of the 95 % interval; NaN if there is none (a single prompt); likewise `high`."""
    high: float
    prompts: int
    samples: int
    """Answers a prompt."""


class Run:
    """A run on disk, finished or not. Everything is read when it is asked for, so a run may still go on."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open a run's folder, such as `runs/demo`; nothing is verified yet.

        Raises:
            ModelError: it is no run.
        """
        self.path = Path(path).absolute()
        if names.role(self.path) != "run":
            raise ModelError(f"{path}: no run is here - give a folder like runs/NAME")

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @property
    def config(self) -> dict[str, Any]:
        """The resolved recipe, as plain data."""
        return read_config(self.path)

    @property
    def stages(self) -> list[str]:
        """Enabled stages, in order."""
        return [name for name, stage in self.config["stages"].items() if stage.get("enabled", True)]

    @property
    def finished(self) -> bool:
        """Whether all stages are done."""
        return all(StageDirectory(self.path / name).says_done for name in self.stages)

    @property
    def checkpoints(self) -> dict[str, Path]:
        """Stage -> folder of its result, for stages that are done and leave a model; in order, unverified."""
        record = read_record(self.path)
        rows = {name for name, left in (record.leaves if record else {}).items() if left == "rows"}
        stages = {name: StageDirectory(self.path / name) for name in self.stages if name not in rows}
        return {name: stage.final for name, stage in stages.items() if stage.says_done}

    @property
    def checkpoint(self) -> Path:
        """The run's result: the model of its last stage that leaves a policy, verified.

        Raises:
            ModelError: that stage is not done. DiskError: the result is damaged.
        """
        found = find_checkpoint(self.path)
        assert found is not None, "a run"
        return found

    @property
    def evaluation(self) -> list[Score]:
        """The evaluation table, stage by stage; empty where the recipe has no evaluation, or none was made yet."""
        return [score for name in ("base", *self.stages) for score in self._scores(name)]

    def metrics(self, stage: str) -> list[dict[str, float]]:
        """metrics.jsonl of a stage: a dict a logged step, with `step`, `loss` and others; empty before the first.

        Raises:
            ModelError: the run has no such stage. DiskError: it cannot be read.
        """
        return self._lines(stage, names.METRICS)

    def evaluations(self, stage: str) -> list[dict[str, float]]:
        """evaluations.jsonl of a stage: held-out metrics by step, while it trained; errors as `metrics`."""
        return self._lines(stage, names.EVALUATIONS)

    def timings(self, stage: str) -> list[dict[str, float]]:
        """timings.jsonl of a stage: seconds by logged step; errors as `metrics`."""
        return self._lines(stage, names.TIMINGS)

    def load(self, stage: str | None = None) -> Generator:
        """The run's result, or a stage's, for generating; errors as `rlpost.load`."""
        from rlpost.api.generation import load

        return load(self.path if stage is None else self._stage(stage))

    def _stage(self, name: str) -> Path:
        known = self.stages
        if name not in known:
            raise ModelError(f"{self.path}: no stage {name!r}{hint_or_list(name, known, 'stages')}")
        return self.path / name

    def _scores(self, stage: str) -> Iterator[Score]:
        file = self.path / names.EVALUATION / f"{stage}.json"
        with disk_errors(file):
            found = json.loads(file.read_text("utf-8")) if file.is_file() else {}
        for mode, summary in found.items():
            for part, e in summary["accuracy"].items():
                interval = e["value"], e["low"], e["high"]
                yield Score(stage, mode, part, *interval, summary["prompts"], summary["samples"])

    def _lines(self, stage: str, name: str) -> list[dict[str, float]]:
        file = self._stage(stage) / name
        with disk_errors(file):
            text = file.read_text("utf-8") if file.is_file() else ""
        # A line that a running stage has not finished writing is left out.
        whole = text[: text.rfind("\n") + 1].splitlines()
        try:
            return [json.loads(line) for line in whole]
        except ValueError as error:
            raise DiskError(f"{file}: a line is not JSON; the stage's training can be resumed all the same") from error
