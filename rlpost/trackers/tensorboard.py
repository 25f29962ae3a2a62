"""Event files in the run's `trackers/tensorboard`, for `tensorboard --logdir runs`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlpost import console
from rlpost.trackers.api import About, Key, markdown, series_of

_TEXT = "/text_summary"
"""What TensorBoard's plugin for texts ends their tags with."""


class TensorBoard:
    """Writes event files, one each time that the run is opened. A step's numbers are one record of it."""

    def __init__(self, about: About) -> None:
        from torch.utils.tensorboard import summary
        from torch.utils.tensorboard.writer import FileWriter

        self._folder = about.folder / "tensorboard"
        self._summary: Any = summary
        self._held = _tags(self._folder)
        self._writer: Any = FileWriter(str(self._folder))
        if ("config", 0) not in self._held:
            text = json.dumps(about.config, indent=2, default=str, ensure_ascii=False)
            self._text("config", "\n".join(f"    {line}" for line in text.splitlines()), 0)
        console.say(f"tensorboard: tensorboard --logdir {about.run.parent}")

    def held(self) -> set[Key]:
        """What the event files hold."""
        return self._held

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """A scalar each."""
        written = self._summary.scalar("", 0.0, new_style=True)
        written.ClearField("value")
        for name, value in metrics.items():
            one = self._summary.scalar(name, value, new_style=True, double_precision=True)
            written.value.extend(one.value)
        self._add(written, step)

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table as Markdown."""
        self._text(name, markdown(columns, rows), step)

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()

    def _text(self, name: str, text: str, step: int) -> None:
        self._add(self._summary.text(name, text), step)

    def _add(self, written: Any, step: int) -> None:
        self._writer.add_summary(written, step)
        self._writer.flush()


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
