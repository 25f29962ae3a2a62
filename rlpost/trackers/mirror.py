"""One tracker of a run: it is sent every line of the logs once, whatever becomes of the run or of the tracker.

trackers/NAME.jsonl in the run is the journal: what a tracker was sent, a line each, written after it was sent. A
resumed run computes some steps again, and those are left out. A tracker that can tell what it holds is believed
instead, since a kill may have lost what it had not written yet.
"""

from __future__ import annotations

import contextlib
import json
import random
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rlpost import console
from rlpost.errors import RecipeError
from rlpost.run.files import encode_line, write_atomic
from rlpost.trackers.api import About, Key, Remembering, Tracker


class Mirror:
    """One tracker of a run; after its first error it is left alone until the run is opened again.

    Raises:
        RecipeError: the tracker refuses how it is set up.
    """

    def __init__(self, name: str, about: About, make: Callable[[Sequence[Key]], Tracker]) -> None:
        """Open it: `make` is given the journal."""
        self._name = name
        self._tracker: Tracker | None = None
        self._journal = about.folder / f"{name.replace(':', '.')}.jsonl"
        self._sent: dict[Key, int | None] = {}
        self._differs: set[str] = set()
        with self._guarded("cannot be opened"):
            about.folder.mkdir(parents=True, exist_ok=True)
            journal = self._read()
            tracker = make(list(journal))
            held = tracker.held() if isinstance(tracker, Remembering) else None
            self._sent = {**journal} if held is None else {key: journal.get(key) for key in held}
            lines = [_line(key, crc) for key, crc in journal.items() if key in self._sent]
            write_atomic(self._journal, b"".join(lines))
            self._tracker = tracker

    def log(self, series: str, step: int, metrics: Mapping[str, float]) -> None:
        """Send numbers, unless they were sent before."""
        named = {f"{series}/{name}": float(value) for name, value in metrics.items()}
        self._once(series, step, named, lambda tracker: tracker.log(step, named))

    def table(self, name: str, step: int, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Send a table, unless it was sent before."""
        self._once(name, step, [columns, rows], lambda tracker: tracker.table(step, name, columns, rows))

    def close(self) -> None:
        """Close the tracker."""
        tracker, self._tracker = self._tracker, None
        with self._guarded("could not be closed"):
            if tracker is not None:
                tracker.close()

    def _once(self, series: str, step: int, content: Any, send: Callable[[Tracker], None]) -> None:
        if self._tracker is None:
            return
        checksum = zlib.crc32(json.dumps(content, default=str).encode())
        if (series, step) not in self._sent:
            with self._guarded("failed"):
                send(self._tracker)
                self._sent[series, step] = checksum
                with self._journal.open("ab") as file:
                    file.write(_line((series, step), checksum))
        elif self._sent[series, step] not in (checksum, None) and series not in self._differs:
            self._differs.add(series)
            console.warn(
                f"{self._name}: it has other values of {series} from step {step} on, of training that was done again, "
                "and keeps them; choose another run=NAME to see both"
            )

    def _read(self) -> dict[Key, int]:
        """The journal; a last line that was cut off is none."""
        data = self._journal.read_bytes() if self._journal.exists() else b""
        lines = data[: data.rfind(b"\n") + 1].splitlines()
        return {(row["series"], row["step"]): row["crc"] for row in map(json.loads, lines)}

    @contextlib.contextmanager
    def _guarded(self, what: str) -> Iterator[None]:
        """Nothing that a tracker does may end or change training: not its errors, prints or random numbers."""
        state, numpy = random.getstate(), np.random.get_state(legacy=False)
        try:
            with contextlib.redirect_stdout(sys.stderr):
                yield
        except RecipeError:
            raise
        except Exception as error:  # any: a tracker may raise what it likes; it is said, and the mirror ends
            failed, self._tracker = self._tracker, None
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            console.warn(
                f"{self._name} {what} ({reason}); the run goes on without it, and it is sent what it misses when the "
                "same command is run again"
            )
            # It has failed and that was said: whether it can still be closed is of no further interest.
            with contextlib.suppress(Exception), contextlib.redirect_stdout(sys.stderr):
                if failed is not None:
                    failed.close()
        finally:
            random.setstate(state)
            np.random.set_state(numpy)


def _line(key: Key, checksum: int) -> bytes:
    return encode_line({"series": key[0], "step": key[1], "crc": checksum})
