"""What a judge has answered, kept on disk: a resumed run asks nothing twice, and is given what it was given before.

One SQLite file, which several processes of a machine may share and which survives a kill at any moment.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from rlpost.errors import DiskError

_WAIT = 60.0
"""Seconds to wait for another process that is writing."""


@dataclass(frozen=True)
class Home:
    """Where a run keeps answers."""

    file: Path
    run: str
    """Its id."""


class _Current:
    home: Home | None = None


@contextmanager
def kept_in(file: Path, run: str) -> Iterator[None]:
    """Inside, judges keep their answers in the file of the run with that id, unless the recipe names a folder."""
    before = _Current.home
    _Current.home = Home(file, run)
    try:
        yield
    finally:
        _Current.home = before


def home() -> Home | None:
    """Where the run that is going on keeps answers; None outside of one."""
    return _Current.home


class Answers:
    """Answers by the key of their question; for the thread that made it."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def get(self, key: str) -> str | None:
        """The answer, None if there is none."""
        row = self._connection.execute("SELECT answer FROM answers WHERE question = ?", (key,)).fetchone()
        return None if row is None else str(json.loads(row[0]))

    def put(self, key: str, answer: str) -> str:
        """Keep an answer; returns the one that is kept, which is an earlier one if another process was faster."""
        # As JSON: half a surrogate pair is no text of SQLite.
        with self._connection:
            self._connection.execute("INSERT OR IGNORE INTO answers VALUES (?, ?)", (key, json.dumps(answer)))
        found = self.get(key)
        assert found is not None
        return found


@contextmanager
def opened(file: Path | None) -> Iterator[Answers]:
    """The answers in a file, which is made if need be; None: in memory.

    Raises:
        DiskError: it cannot be read or written, or is not such a file.
    """
    try:
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(f"{file}: the folder cannot be made ({error.strerror}); choose another `cache`") from error
    try:
        with closing(sqlite3.connect(file or ":memory:", timeout=_WAIT)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")  # writers do not stop readers, and a kill costs nothing
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute("CREATE TABLE IF NOT EXISTS answers (question TEXT PRIMARY KEY, answer TEXT NOT NULL)")
            connection.commit()
            yield Answers(connection)
    except sqlite3.Error as error:
        raise DiskError(
            f"{file}: the judge's answers cannot be kept there ({error}); make room, or remove it to ask again"
        ) from error
