"""Trackio: a local SQLite file, in TRACKIO_DIR if it is set, shown by `trackio show`."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

from rlpost import console
from rlpost.trackers.api import About, Key, flat, series_of


class Trackio:
    """A run of trackio, found again by its name; a row carries its stage's step as `STAGE/step`."""

    def __init__(self, about: About) -> None:
        import trackio

        self._about = about
        self._trackio: Any = trackio
        config = {key: str(value) for key, value in flat(about.config).items()}
        with contextlib.redirect_stdout(io.StringIO()):
            trackio.init(
                project=about.project,
                name=about.name,
                config=config,
                resume="allow",
                embed=False,
                auto_log_cpu=False,
                auto_log_gpu=False,
            )
        console.say(f"trackio: trackio show --project {about.project}")

    def held(self) -> set[Key] | None:
        """What the SQLite file holds: a kill may have lost what was not yet written. None with a server."""
        from trackio.sqlite_storage import SQLiteStorage

        if os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL"):
            return None
        found = set()
        for row in SQLiteStorage.get_logs(self._about.project, self._about.name):
            tables = [name for name, value in row.items() if isinstance(value, dict)]
            stage = next(name.removesuffix("/step") for name in row if name.endswith("/step"))
            found.add((tables[0] if tables else stage, row[f"{stage}/step"]))
        return found

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One row."""
        self._send(step, dict(metrics))

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A row with a table of texts."""
        self._send(step, {name: self._trackio.Table(columns=list(columns), data=[list(map(str, row)) for row in rows])})

    def close(self) -> None:
        """Write what is waiting."""
        with contextlib.redirect_stdout(io.StringIO()):
            self._trackio.finish()

    def _send(self, step: int, row: dict[str, Any]) -> None:
        self._trackio.log(row | {f"{series_of(name)}/step": step for name in row})


def opened(about: About, journal: Sequence[Key]) -> Trackio:  # noqa: ARG001 - its file says it
    """The tracker of a run."""
    return Trackio(about)
