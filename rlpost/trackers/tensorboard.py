"""Event files in the run's `trackers/tensorboard`, for `tensorboard --logdir runs`."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from rlpost import console
from rlpost.trackers.api import About, Key, markdown, series_of

_TEXT = "/text_summary"
"""What TensorBoard's plugin for texts ends their tags with."""


class TensorBoard:
    """Writes event files, one each time that the run is opened. A step's numbers are one record of it."""

    def __init__(self, about: About) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter
        from torch.utils.tensorboard import summary

        folder = about.folder / "tensorboard"
        self._summary: Any = Summary
        self._text = cast(Any, summary.text)
        self._event: Any = Event
        self._held = _tags(folder)
        folder.mkdir(exist_ok=True)
        # Not by TensorBoard's own writer, whose thread prints a traceback when the disk is full.
        self._file = (folder / f"events.out.tfevents.{time.time_ns()}.{platform.node()}").open("xb")
        self._records: Any = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        if ("config", 0) not in self._held:
            settings = json.dumps(about.config, indent=2, default=str, ensure_ascii=False)
            code = "\n".join(f"    {line}" for line in settings.splitlines())
            self._write(summary=self._text("config", code), step=0)
        console.say(f"tensorboard: tensorboard --logdir {about.run.parent}")

    def held(self) -> set[Key]:
        """What the event files hold."""
        return self._held

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """A scalar each."""
        # In 32 bits: TensorBoard's loader leaves out scalars of 64.
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._write(summary=self._summary(value=values), step=step)

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table as Markdown."""
        self._write(summary=self._text(name, markdown(columns, rows)), step=step)

    def close(self) -> None:
        """Close the event file."""
        self._file.close()

    def _write(self, **content: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **content).SerializeToString())
        self._file.flush()


def _tags(folder: Path) -> set[Key]:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    return {
        (value.tag.removesuffix(_TEXT) if value.tag.endswith(_TEXT) else series_of(value.tag), event.step)
        for file in folder.glob("events.out.tfevents.*")
        for event in EventFileLoader(str(file)).Load()
        for value in event.summary.value
    }


def opened(about: About, journal: Sequence[Key]) -> TensorBoard:  # noqa: ARG001 - its files say it
    """The tracker of a run."""
    return TensorBoard(about)
