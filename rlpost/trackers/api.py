"""What a tracker is, and what it is told of the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

Key = tuple[str, int]
"""What is sent at once: the numbers of a step, (`grpo`, 3), or a table, (`grpo/samples`, 1)."""


class Tracker(Protocol):
    """Something that shows a run's numbers. An error that it raises ends this mirror, never the run."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Numbers of one step of one stage, by `STAGE/NAME`; every stage counts its own steps from 1."""
        ...

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table called `STAGE/NAME`, such as samples with their rewards."""
        ...

    def close(self) -> None:
        """Send what is still waiting."""
        ...


@runtime_checkable
class Remembering(Protocol):
    """A tracker that can tell what it holds of the run, which counts more than what it was sent."""

    def held(self) -> set[Key] | None:
        """All numbers and tables that it holds. None: it cannot tell here."""
        ...


@dataclass(frozen=True)
class About:
    """The run that a tracker is opened for."""

    run: Path
    """Its directory."""
    id: str
    """Its own id, from run.json: the same when it is resumed."""
    project: str
    config: Mapping[str, Any]
    """The resolved recipe."""
    folder: Path
    """Where trackers keep files of the run."""

    @property
    def name(self) -> str:
        """The run's name, with the beginning of its id: a new run of an old name is another run."""
        return f"{self.run.name}-{self.id[:6]}"


EVAL = "eval"
"""Below a stage's name: what was measured on held-out rows while it trained."""


def series_of(metric: str) -> str:
    """Where a metric belongs: the stage of `STAGE/NAME`, and `STAGE/eval` of `STAGE/eval/NAME`."""
    stage, _, name = metric.partition("/")
    return f"{stage}/{EVAL}" if name.startswith(f"{EVAL}/") else stage


def markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """The table as Markdown; texts are shown as they are, on one line."""

    def line(cells: Sequence[Any]) -> str:
        texts = (str(cell).replace("\\", "\\\\").replace("|", "\\|").replace("\n", "⏎") for cell in cells)
        return f"| {' | '.join(texts)} |"

    return "\n".join([line(columns), line(["---"] * len(columns)), *map(line, rows)])


def flat(config: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Settings by key path."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        path = f"{where}.{key}" if where else str(key)
        found |= flat(value, path) if isinstance(value, Mapping) and value else {path: value}
    return found
