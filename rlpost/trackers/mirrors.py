"""All trackers of a run: opened, sent what the run's files hold, closed."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from rlpost.data.messages import question
from rlpost.errors import RecipeError
from rlpost.ranks import is_first
from rlpost.run import names
from rlpost.trackers.api import EVAL, About, Key, Tracker
from rlpost.trackers.mirror import Mirror
from rlpost.trackers.params import TRACKER, TRACKERS, Logging, short
from rlpost.usercode.binding import bind
from rlpost.usercode.bound import Bound
from rlpost.usercode.params import Function


def check(logging: Logging, folder: Path) -> None:
    """Refuse trackers whose package or function is missing.

    Raises:
        RecipeError: with the command that installs the package.
    """
    for i, name in enumerate(logging.to):
        if name not in TRACKERS:
            _function(name, i, folder)
        elif importlib.util.find_spec(name) is None:
            raise RecipeError(f"logging.to[{i}]: {name} is not installed - pip install 'rlpost[{name}]'")


class Mirrors:
    """The trackers of a run; without any, everything here does nothing."""

    def __init__(self, mirrors: Sequence[Mirror] = (), samples: int = 0) -> None:
        """They are open; a table of samples has `samples` rows."""
        self._mirrors = mirrors
        self._samples = samples

    def log(self, series: str, step: int, metrics: Mapping[str, float]) -> None:
        """Send numbers of a step; `series` is the stage's name, or `evaluation`."""
        for mirror in self._mirrors:
            mirror.log(series, step, metrics)

    def table(self, name: str, step: int, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Send a table, unless it is empty."""
        for mirror in self._mirrors if rows else ():
            mirror.table(name, step, columns, rows)

    def rollouts(self, stage: str, file: Path) -> None:
        """Send the first samples of rollouts/step-000010.jsonl."""
        if self._mirrors and self._samples:
            with file.open(encoding="utf-8") as lines:
                groups = map(json.loads, lines)
                rows = ((_prompt(g["example"]), c["text"], c["reward"]) for g in groups for c in g["completions"])
                chosen = list(islice(rows, self._samples))
            self.table(f"{stage}/samples", names.step_of(file) or 0, ("prompt", "completion", "reward"), chosen)

    def catch_up(self, stage: str, folder: Path) -> None:
        """Send what the stage's logs hold."""
        if not self._mirrors:
            return
        for log, series in ((folder / names.METRICS, stage), (folder / names.EVALUATIONS, f"{stage}/{EVAL}")):
            for line in log.read_bytes().splitlines() if log.exists() else ():
                row = json.loads(line)
                self.log(series, row.pop("step"), {name: value for name, value in row.items() if value is not None})
        for file in sorted((folder / names.ROLLOUTS).glob("step-*.jsonl")):
            self.rollouts(stage, file)

    def evaluation(self, stage: str, number: int, summaries: Mapping[str, Any], answers: Path) -> None:
        """Send the evaluation of a stage: its numbers with their intervals at step `number`, and samples."""
        if not self._mirrors:
            return
        numbers: dict[str, float] = {}
        for mode, summary in summaries.items():
            for part, estimate in summary["accuracy"].items():
                name = mode if part == "all" else f"{mode}/{part}"
                numbers |= {name: estimate["value"], f"{name}/low": estimate["low"], f"{name}/high": estimate["high"]}
            numbers[f"{mode}/length"] = summary["length"]
        self.log(names.EVALUATION, number, numbers)
        columns = ("mode", "prompt", "completion", "reward")
        with answers.open(encoding="utf-8") as lines:
            chosen = [[stage, *(row[c] for c in columns)] for row in map(json.loads, islice(lines, self._samples))]
        self.table(f"{names.EVALUATION}/samples", number, ("stage", *columns), chosen)


@contextlib.contextmanager
def open_mirrors(logging: Logging, about: About, folder: Path) -> Iterator[Mirrors]:
    """The trackers that a recipe names, on the first rank; they are closed in the end, also when the run stops.

    Args:
        logging: the recipe's section.
        about: the run.
        folder: the recipe's, which `file.py:function` refers to.

    Raises:
        RecipeError: a tracker refuses how it is set up.
    """
    mirrors: list[Mirror] = []
    try:
        for i, name in enumerate(logging.to if is_first() else ()):
            mirrors.append(Mirror(short(name), about, _maker(name, i, about, folder)))
        yield Mirrors(mirrors, logging.samples)
    finally:
        for mirror in mirrors:
            mirror.close()


def _prompt(example: Mapping[str, Any]) -> str:
    """What was asked: the last message of a user, or the text of the prompt."""
    return question(example) or str(example.get("prompt", ""))


def _maker(name: str, number: int, about: About, folder: Path) -> Callable[[Sequence[Key]], Tracker]:
    def make(journal: Sequence[Key]) -> Tracker:
        if name in TRACKERS:
            made: Tracker = importlib.import_module(f"rlpost.trackers.{name}").opened(about, journal)
            return made
        function = _function(name, number, folder)
        given = {"run": about.run, "config": about.config}
        own: Tracker = function(**{key: given[key] for key in function.__signature__.parameters if key in given})
        missing = [method for method in ("log", "table", "close") if not callable(getattr(own, method, None))]
        if missing:
            raise RecipeError(f"logging.to[{number}]: what {function.name} returns has no method {missing[0]!r}")
        return own

    return make


def _function(name: str, number: int, folder: Path) -> Bound:
    return bind(Function(fn=name), replace(TRACKER, key=f"to[{number}]"), "logging", folder)
