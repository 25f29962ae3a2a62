"""What a report shows of a run, read from its folder; a part that is not there yet is empty."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlpost.api.run import Run, Score
from rlpost.errors import DiskError, RecipeError
from rlpost.recipe.resolve import resolve
from rlpost.run import names
from rlpost.run.files import disk_errors
from rlpost.run.stage import StageDirectory
from rlpost.section import Section, walk

MOST_SAMPLES = 6
_LONGEST = 1200
"""Characters of a value or an answer."""


@dataclass(frozen=True)
class StageView:
    """A stage of a run."""

    name: str
    kind: str
    state: str
    """done, unfinished, or not begun."""
    start: str
    """What it started from."""
    metrics: list[dict[str, float]]
    steps: int
    seconds: float


@dataclass(frozen=True)
class Sample:
    """A held-out prompt, answered by the first and by the last evaluated model."""

    prompt: str
    before: str
    reward_before: float | None
    after: str
    reward_after: float | None


@dataclass(frozen=True)
class RunView:
    """Everything shown of a run."""

    name: str
    path: str
    description: str
    finished: bool
    stages: list[StageView]
    scores: list[Score]
    before: str
    """The stage of the answers before, and after; empty without an evaluation."""
    after: str
    samples: list[Sample]
    environment: list[tuple[str, str]]
    overrides: list[str]
    changed: list[tuple[str, str, str]]
    """(key, default, value) of settings that are not their defaults."""


def collect(path: str) -> RunView:
    """Read a run.

    Raises:
        ModelError: there is no run. DiskError: a file of it is damaged.
    """
    run = Run(path)
    config = run.config
    try:
        stages = [_stage(run, name, config["stages"][name]) for name in run.stages]
        scores = run.evaluation
        before, after, samples = _samples(run, [s.stage for s in scores])
        environment = list(_flat(_json(run.path / names.ENVIRONMENT)))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DiskError(f"{run.path}: a file of it is damaged ({error}); go on with its `rlpost train`") from error
    return RunView(
        name=run.path.name,
        path=str(path),
        description=str(config.get("description") or ""),
        finished=run.finished,
        stages=stages,
        scores=scores,
        before=before,
        after=after,
        samples=samples,
        environment=environment,
        overrides=_text(run.path / names.OVERRIDES).splitlines(),
        changed=_changed(run.path / names.CONFIG),
    )


def _stage(run: Run, name: str, config: dict[str, Any]) -> StageView:
    folder = run.path / name
    metrics = [{k: v for k, v in row.items() if isinstance(v, int | float)} for row in run.metrics(name)]
    steps = int(metrics[-1]["step"]) if metrics else 0
    for row in run.evaluations(name):
        metrics.append({k if k == "step" else f"eval/{k}": v for k, v in row.items() if isinstance(v, int | float)})
    done = StageDirectory(folder).says_done
    about = _json(folder / names.FINAL / names.ABOUT)
    start = str(about.get("parent") or config.get("start") or "")
    inside = Path(start).parts[-2:-1] if Path(start).name == names.FINAL else Path(start).parts[-1:]
    return StageView(
        name=name,
        kind=str(config["kind"]).rpartition(":")[2],
        state="done" if done else "unfinished" if folder.exists() else "not begun",
        start=inside[0] if inside else "",
        metrics=metrics,
        steps=steps,
        seconds=sum(float(row["seconds"]) for row in run.timings(name)),
    )


def _samples(run: Run, stages: list[str]) -> tuple[str, str, list[Sample]]:
    """The prompts whose rewards changed most, gains first, and two that did not rise."""
    evaluated = list(dict.fromkeys(stages))
    if not evaluated:
        return "", "", []
    rows = [_answers(run.path / names.EVALUATION / f"{name}.jsonl") for name in (evaluated[0], evaluated[-1])]
    found = [
        Sample(_cut(a["prompt"]), _cut(a["completion"]), a["reward"], _cut(b["completion"]), b["reward"])
        for a, b in zip(*rows, strict=False)
    ]
    found.sort(key=lambda s: (s.reward_before or 0.0) - (s.reward_after or 0.0))
    chosen = found if len(found) <= MOST_SAMPLES else [*found[: MOST_SAMPLES - 2], *found[-2:]]
    return evaluated[0], evaluated[-1], chosen


def _answers(file: Path) -> list[dict[str, Any]]:
    """Greedy answers, else sampled ones."""
    rows: list[dict[str, Any]] = [json.loads(line) for line in _text(file).splitlines()]
    return [row for row in rows if row["mode"] == "greedy"] or rows


def _changed(file: Path) -> list[tuple[str, str, str]]:
    """Settings that differ from their defaults; none if the recipe cannot be read any more, as its files have gone."""
    try:
        config = resolve(str(file), lenient=True).config
    except RecipeError:
        return []
    return list(_differences(config))


def _differences(config: Section) -> Iterator[tuple[str, str, str]]:
    for where, section in walk(config):
        for key, info in type(section).model_fields.items():
            value = getattr(section, key)
            if where == "" and key in ("run", "runs", "folder", "vars", "description"):
                continue
            if any(True for _ in walk(value)) or (
                not info.is_required() and value == info.get_default(call_default_factory=True)
            ):
                continue  # what a section holds is walked by itself
            default = "" if info.is_required() else _plain(info.get_default(call_default_factory=True))
            yield f"{where}.{key}" if where else key, default, _cut(_plain(value))


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def _flat(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in found.items():
        if isinstance(value, dict):
            yield from ((k, str(v)) for k, v in value.items())
        elif value is not None:
            yield key, str(value)


def _json(file: Path) -> dict[str, Any]:
    text = _text(file)
    found = json.loads(text) if text else {}
    if not isinstance(found, dict):
        raise ValueError(f"{file.name} is no mapping")
    return found


def _text(file: Path) -> str:
    with disk_errors(file):
        return file.read_text("utf-8", errors="replace") if file.is_file() else ""


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"
