"""Saved rollouts as text: conversations with the rewards of their turns."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlpost.console import clean
from rlpost.data.messages import question
from rlpost.errors import DataError, ModelError
from rlpost.run.files import disk_errors
from rlpost.run.names import ROLLOUTS
from rlpost.train.rollout_rows import line_of

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Saved:
    """The rollouts of a step."""

    file: Path
    rows: Sequence[Row]


def read_rollouts(path: str, step: int | None = None) -> Saved:
    """The rollouts of a step of a run, or of a stage in it, or in a file; by default the newest.

    Raises:
        ModelError: there are none. DataError: the file is no file of rollouts. DiskError: it cannot be read.
    """
    file = _file(Path(path), step)
    rows = []
    with disk_errors(file):
        lines = file.read_text("utf-8").splitlines()
    for number, text in enumerate(lines, start=1):
        try:
            row = json.loads(text)
            rows.append({"example": row["example"], "completions": [dict(c) for c in row["completions"]]})
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{file}:{number}: no rollout, which has an `example` and `completions`") from error
    return Saved(file, rows)


def shown(saved: Saved, prompts: int, every: bool) -> Iterator[str]:
    """Lines for people.

    Args:
        saved: the rollouts.
        prompts: most prompts to show.
        every: show all completions of a prompt; else the best and the worst.
    """
    yield f"{saved.file}: {len(saved.rows)} prompts"
    for number, row in enumerate(saved.rows[:prompts], start=1):
        yield ""
        yield f"prompt {number}: {clean(_prompt(row), '⏎')}"
        for i in _chosen(row["completions"], every):
            yield from _completion(row["completions"][i], i + 1)


def _file(path: Path, step: int | None) -> Path:
    if path.is_file():
        return path
    found = [*path.glob(f"{ROLLOUTS}/step-*.jsonl"), *path.glob(f"*/{ROLLOUTS}/step-*.jsonl")]
    if not found:
        raise ModelError(f"{path}: no rollouts are here - name a run whose stages sample, with table_every above 0")
    newest = max(found, key=lambda file: (file.stat().st_mtime_ns, file.name))
    if step is None:
        return newest
    wanted = [file for file in found if _step(file) == step]
    if not wanted:
        steps = ", ".join(map(str, sorted({_step(file) for file in found})))
        raise ModelError(f"{path}: no rollouts of step {step} are here - there are those of {steps}")
    return max(wanted, key=lambda file: file.stat().st_mtime_ns)


def _step(file: Path) -> int:
    number = file.stem.removeprefix("step-")
    return int(number) if number.isdecimal() else 0


def _prompt(row: Row) -> str:
    example = row["example"]
    given = question(example) or example.get("prompt")
    return given if isinstance(given, str) else json.dumps(example, ensure_ascii=False)


def _chosen(completions: Sequence[Row], every: bool) -> list[int]:
    """Numbers of the completions to show: the best first."""
    scored = [(c.get("reward") is not None, c.get("reward") or 0.0) for c in completions]
    order = sorted(range(len(completions)), key=lambda i: scored[i], reverse=True)
    return order if every or len(order) < 3 else [order[0], order[-1]]


def _completion(c: Row, number: int) -> Iterator[str]:
    reward = "unscored" if c.get("reward") is None else f"reward {c['reward']:.3g}"
    yield f"  completion {number}: {reward}, {c.get('finish') or 'recorded'}"
    messages = c.get("messages") or [{"role": "assistant", "content": c.get("text", "")}]
    for message in messages:
        yield f"    {clean(line_of(message), '⏎')}"
