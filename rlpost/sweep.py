"""Runs a recipe once for every combination of values, as sibling runs: `rlpost sweep`."""

from __future__ import annotations

import gc
import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

from rlpost import console
from rlpost.api.run import Run, Score
from rlpost.errors import Interrupted, RecipeError, RlpostError
from rlpost.recipe.overrides import alternatives
from rlpost.recipe.resolve import Resolved, resolve

MOST = 1000
"""Combinations of a sweep."""
_LONGEST = 80
"""Characters of a run's name."""


@dataclass(frozen=True)
class Combination:
    """One choice of values."""

    values: dict[str, str]
    """Key -> value, as text, of the keys that have several."""
    resolved: Resolved

    @property
    def path(self) -> Path:
        """The run's folder."""
        return Path(self.resolved.config.runs) / self.resolved.config.run

    def __str__(self) -> str:
        return " ".join(f"{key}={value}" for key, value in self.values.items())


@dataclass(frozen=True)
class Outcome:
    """What became of a combination."""

    run: Path
    values: dict[str, str]
    checkpoint: Path | None
    """The run's result; None if it failed."""
    scores: tuple[Score, ...]
    """The evaluation of that result: overall and by slice; empty without one."""
    error: RlpostError | None = None

    def to_json(self) -> dict[str, Any]:
        """The same as plain data."""
        return {
            "run": str(self.run),
            "values": self.values,
            "checkpoint": None if self.checkpoint is None else str(self.checkpoint),
            "evaluation": [asdict(score) for score in self.scores],
            "error": None if self.error is None else str(self.error),
        }


def plan(recipe: str, words: Sequence[str]) -> list[Combination]:
    """Every combination of the values in `words`, each resolved and checked, in the order of the words.

    Args:
        recipe: a path, or the name of a packaged recipe.
        words: `key=value`; at least one with several, `key=1,2` or `key=range(1,4)`.

    Raises:
        RecipeError: no key has several values, there are too many combinations, or one is wrong.
    """
    several: dict[str, list[str]] = {}
    fixed: list[str] = []
    for word in words:
        key, values = alternatives(word)
        if key in several or (values and any(other.startswith(f"{key}=") for other in fixed)):
            raise RecipeError(f"{key}: given twice")
        if values is None:
            fixed.append(word)
        elif key in ("run", "runs"):
            raise RecipeError(f"{key}: a sweep names its runs by their values - give one {key}, or none")
        else:
            several[key] = values
    if not several:
        raise RecipeError("nothing to sweep: give a key several values, like 'seed=1,2,3' or 'seed=range(1,4)'")
    count = prod(map(len, several.values()))
    if count > MOST:
        raise RecipeError(f"{count} combinations - at most {MOST} in one sweep")
    chosen = [dict(zip(several, values, strict=True)) for values in product(*several.values())]
    made = list(_resolved(recipe, fixed, chosen))
    same = {c.path: c for c in made}
    for combination in made:
        if same[combination.path] is not combination:
            raise RecipeError(f"{combination}: would be the run {combination.path} too, as {same[combination.path]}")
    return made


def check(combinations: Sequence[Combination]) -> None:
    """Bind the functions and read the sources of every combination, before the first one trains.

    Raises:
        RlpostError: of the first that is wrong.
    """
    from rlpost import pipeline

    for combination in combinations:
        with _named(combination):
            pipeline.preflight(combination.resolved, rows=False)


def sweep(combinations: Sequence[Combination], allow_change: bool = False) -> list[Outcome]:
    """Train each, resuming what is unfinished; one that fails is noted, and the next one is trained.

    Returns:
        What became of each, best first: by the evaluation of its result (greedy, else sampled, over all prompts), then
        those without, then those that failed.

    Raises:
        Interrupted: by a signal; the same sweep goes on from there.
    """
    outcomes = []
    for number, combination in enumerate(combinations, 1):
        console.say(f"run {number} of {len(combinations)}: {combination.path} ({combination})")
        outcomes.append(_trained(combination, allow_change))
        gc.collect()  # the last run's model, before the next one is loaded
    return sorted(outcomes, key=_rank)


def table(outcomes: Sequence[Outcome]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: a run a row, its values, and the share of right answers in % with its 95 % interval."""
    from rlpost.evaluate.evaluator import percent
    from rlpost.evaluate.statistics import Estimate

    keys = list(outcomes[0].values)
    heads = list(dict.fromkeys(_head(score) for outcome in outcomes for score in outcome.scores))
    rows = []
    for outcome in outcomes:
        cells = {_head(s): percent(Estimate(s.value, s.low, s.high)) for s in outcome.scores}
        state = "done" if outcome.error is None else f"failed: {_short(str(outcome.error))}"
        rows.append([str(outcome.run), *outcome.values.values(), *(cells.get(head, "") for head in heads), state])
    return ["run", *_short_keys(keys), *heads, ""], rows


def show(outcomes: Sequence[Outcome]) -> None:
    """Print the table, and what is to be thought of its order."""
    from rlpost.evaluate.statistics import Estimate
    from rlpost.evaluate.table import unit

    columns, rows = table(outcomes)
    scores = [score for outcome in outcomes for score in outcome.scores]
    if scores:
        what = unit(Estimate(s.value, s.low, s.high) for s in scores)
        console.table(f"{what} [95 % interval], {scores[0].prompts} prompts, best first", columns, rows)
    else:
        console.table("runs", columns, rows)
    if not scores:
        console.say("no run has an evaluation to be ordered by; give the recipe one (`evaluation`)")
    elif close := within_noise(outcomes):
        console.say(f"intervals of {close} of the other runs overlap the best's: their order may be chance")


def within_noise(outcomes: Sequence[Outcome]) -> int:
    """How many runs, after the best, have an interval that overlaps the best's."""
    first = [outcome.scores[0] for outcome in outcomes if outcome.scores]
    return sum(score.high >= first[0].low for score in first[1:])


def name_of(base: str, values: dict[str, str]) -> str:
    """A run's name by its values: `demo-seed-1-learning_rate-0.001`; long ones are cut and end in a digest."""
    words = [
        word for key, value in zip(_short_keys(list(values)), values.values(), strict=True) for word in (key, value)
    ]
    whole = "-".join([base, *words])
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", whole)
    if name == whole and len(name) <= _LONGEST:
        return name
    digest = hashlib.sha256(repr(sorted(values.items())).encode()).hexdigest()[:8]
    return f"{name[: _LONGEST - 9]}-{digest}"


@contextmanager
def _named(combination: object) -> Iterator[None]:
    """Names the combination in an error of its recipe."""
    try:
        yield
    except RecipeError as error:
        raise type(error)(f"{combination}: {error}") from error


def _resolved(recipe: str, fixed: list[str], chosen: Sequence[dict[str, str]]) -> Iterator[Combination]:
    base = ""
    for values in chosen:
        words = [*fixed, *(f"{key}={value}" for key, value in values.items())]
        with _named(" ".join(words[len(fixed) :])):
            base = base or resolve(recipe, words).config.run
            others = [word for word in words if not word.startswith("run=")]
            yield Combination(values, resolve(recipe, [*others, f"run={name_of(base, values)}"]))


def _trained(combination: Combination, allow_change: bool) -> Outcome:
    from rlpost import pipeline

    try:
        checkpoint = pipeline.train(combination.resolved, allow_change)
    except Interrupted:
        raise
    except RlpostError as error:
        console.warn(f"{combination.path}: {error}")
        return Outcome(combination.path, combination.values, None, (), error)
    scores = Run(combination.path).evaluation
    last = [score for score in scores if score.stage == scores[-1].stage]
    return Outcome(combination.path, combination.values, checkpoint, tuple(last))


def _rank(outcome: Outcome) -> tuple[int, float]:
    if outcome.error is not None:
        return 2, 0.0
    return (0, -outcome.scores[0].value) if outcome.scores else (1, 0.0)


def _head(score: Score) -> str:
    return score.mode if score.part == "all" else f"{score.mode}, {score.part}"


def _short_keys(keys: Sequence[str]) -> list[str]:
    """The shortest endings of the keys, in whole parts, that tell them apart."""
    parts = [key.split(".") for key in keys]
    for length in range(1, max(map(len, parts)) + 1):
        short = [".".join(p[-length:]) for p in parts]
        if len(set(short)) == len(short):
            return short
    return list(keys)


def _short(text: str, most: int = 80) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[:most]} …"
