"""The process of one user's file, seen from the parent: started when needed, and again after one was lost.

Not `multiprocessing`: a plain script on a pipe does not import `__main__` again, pickles nothing, and ends when this
end of the pipe closes.
"""

from __future__ import annotations

import atexit
import json
import sys
import threading
from pathlib import Path
from typing import Any

from rlpost.usercode.pipe import Pipe


class UserProcess:
    """One process at a time; any thread may use it."""

    def __init__(self, file: Path, digest: str) -> None:
        self._file = file
        self._digest = digest
        self._lock = threading.Lock()
        self._pipe: Pipe | None = None
        _every.append(self)

    def start(self, deadline: float) -> dict[str, Any]:
        """Start it anew and let it run the file for at most `deadline` seconds; returns its description of the file.

        Raises:
            Gone: it ended, or took too long.
            Stopped: a signal asked us to stop, and the process was ended.
        """
        self.end()
        return self.pipe(deadline).described()

    def pipe(self, deadline: float) -> Pipe:
        """The pipe to it; where it does not run it is started, and runs the file for at most `deadline` seconds."""
        with self._lock:
            if self._pipe is None or not self._pipe.running:
                hello = {"path": sys.path, "file": str(self._file), "digest": self._digest}
                self._pipe = Pipe(json.dumps(hello).encode() + b"\n", deadline)
            return self._pipe

    def end(self) -> None:
        """End it and the processes it has started."""
        if self._pipe is not None:
            self._pipe.end()


_every: list[UserProcess] = []


def end_all() -> None:
    """End every user's process."""
    for process in _every:
        process.end()


atexit.register(end_all)
