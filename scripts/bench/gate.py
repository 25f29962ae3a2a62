"""The gate between the driver and a side: a side stands still until it is let do its next step."""

from __future__ import annotations

import os
import time
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

ADDRESS = "RLPOST_BENCH"
"""Environment variable with the address of the driver's socket."""


class BenchError(RuntimeError):
    """Something cannot be measured; its message is one line."""


class Gate:
    """A side's end: reports each step's seconds, and waits to be let on."""

    def __init__(self) -> None:
        self._driver: Connection = Client(os.environ[ADDRESS], "AF_UNIX")
        self._begin = time.perf_counter()

    def passed(self, **told: Any) -> None:
        """A step is over: tell its seconds and what else there is, and wait."""
        seconds = time.perf_counter() - self._begin
        peak = _peak_gib()
        try:
            self._driver.send({"seconds": seconds, "peak_gib": peak, **told})
            self._driver.recv()
        except (EOFError, OSError):
            # The driver is gone. An exception would not end every side: a tracker's is caught.
            os._exit(1)
        self._begin = time.perf_counter()


def _peak_gib() -> float:
    """Resident memory at most; not `ru_maxrss`, which a process inherits from the one that started it."""
    kib = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")).split()[
        1
    ]
    return int(kib) / 2**20
