"""Weights & Biases; WANDB_MODE, WANDB_ENTITY and its other variables are honoured."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlpost import console
from rlpost.errors import RecipeError
from rlpost.trackers.api import About, Key, series_of


class Wandb:
    """A run of wandb with the id of ours; a stage's numbers are over its own axis, `STAGE/step`.

    wandb's own step is the number of the row, so that a server drops a row that it has.

    Raises:
        RecipeError: nobody is logged in.
    """

    def __init__(self, about: About, journal: Sequence[Key]) -> None:
        import wandb

        self._table = wandb.Table
        self._defined: set[str] = set()
        try:
            self._run: Any = wandb.init(
                project=about.project,
                name=about.run.name,
                id=about.id,
                resume="allow",
                dir=str(about.folder),
                config=dict(about.config),
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.errors.UsageError as error:
            raise RecipeError(f"logging.to: wandb: {error} Or set WANDB_MODE=offline") from error
        if self._run.offline:
            rows = dict(_rows(about.folder / "wandb"))
            self._held, self._row = set(rows.values()), max(rows, default=-1) + 1
            console.say(f"wandb: offline; wandb sync {Path(self._run.dir).parent}")
        else:
            # Rows arrive in order; after a kill the server says how many did.
            self._row = min(self._run.step, len(journal))
            self._held = set(journal[: self._row])
            console.say(f"wandb: {self._run.url or 'disabled'}")

    def held(self) -> set[Key]:
        """What it has of this run."""
        return self._held

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One row of the history."""
        self._send(step, dict(metrics))

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table of texts."""
        self._send(step, {name: self._table(columns=list(columns), data=[list(map(str, row)) for row in rows])})

    def close(self) -> None:
        """Upload what is waiting, and end the run."""
        self._run.finish()

    def _send(self, step: int, row: dict[str, Any]) -> None:
        axes = {name: f"{series_of(name)}/step" for name in row}
        for name in row.keys() - self._defined:
            self._run.define_metric(name, step_metric=axes[name])
        self._defined |= row.keys()
        self._run.log(row | dict.fromkeys(axes.values(), step), step=self._row, commit=True)
        self._row += 1


def _rows(folder: Path) -> Iterator[tuple[int, Key]]:
    """The rows in wandb's files of this run: wandb's step, and what the row is."""
    from wandb.proto.wandb_internal_pb2 import Record

    for file in folder.glob("*run-*/*.wandb"):
        for data in _records(file.read_bytes()):
            items = Record.FromString(data).history.item
            plain = {item.nested_key[0] if item.nested_key else item.key: item.value_json for item in items}
            if "_step" not in plain:
                continue
            axis = next(name for name in plain if name.endswith("/step"))
            # A table is spread over items `NAME, key`; its name stands here once.
            table = next((item.nested_key[0] for item in items if len(item.nested_key) > 1), None)
            yield int(plain["_step"]), (table or series_of(axis), int(plain[axis]))


def _records(data: bytes) -> Iterator[bytes]:
    """The records of a log in LevelDB's format, after wandb's header; one that was cut off ends it."""
    block, header, whole_or_last = 32768, struct.Struct("<IHB"), (1, 4)
    place, parts = 7, b""
    while True:
        if block - place % block < header.size:
            place += block - place % block
        if place + header.size > len(data):
            return
        _, length, kind = header.unpack_from(data, place)
        place += header.size
        if place + length > len(data):
            return
        parts += data[place : place + length]
        place += length
        if kind in whole_or_last:
            yield parts
            parts = b""


def opened(about: About, journal: Sequence[Key]) -> Wandb:
    """The tracker of a run."""
    return Wandb(about, journal)
